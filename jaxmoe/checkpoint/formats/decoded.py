"""Quantized weights as the plain tensors that they stand for, so that all that follows sees plain tensors."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np

from jaxmoe.checkpoint.boxes import Box
from jaxmoe.checkpoint.formats.dtypes import can_cast
from jaxmoe.checkpoint.formats.files import Checkpoint
from jaxmoe.checkpoint.formats.safetensors import Split, TensorInfo
from jaxmoe.quant import QuantizedWeight, match_tensors, read_quantization

_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodedTensor(TensorInfo):
    """A quantized weight, addressed as the plain tensor that it stands for.

    `dtype` is that of the values that are given, `dtype_name` the name of the format, `nbytes` the stored bytes that
    values are decoded from, `file` and `offset` those of the first part. `dim_order` is that of a plain tensor whose dims
    lie as those of the format's matrices do.

    Attributes:
        weight: format of the weight, and the boxes of its parts.
        parts: stored tensors by role; the scales of activations among them, which values do not depend on.
        splits: dims that each dim of the weight is split in; () where none is.
        order: dims of the weight, all of them split, in the order in which boxes have them; None where that is theirs.
    """

    weight: QuantizedWeight
    parts: Mapping[str, TensorInfo]
    splits: Split = ()
    order: tuple[int, ...] | None = None

    @property
    def form(self) -> str:
        """The format and settings of the weight."""
        return self.weight.format.describe()

    def split(self, split: Split) -> Self:
        """The same with each dim as the dims that it is split in; () leaves it as it is."""
        return dataclasses.replace(TensorInfo.split(self, split), splits=split) if split else self

    def as_stored(self) -> Self:
        """The same with its dims in the order of the format's matrices, whose rows lie together in the files."""
        return self if self.dim_order is None else dataclasses.replace(TensorInfo.as_stored(self), order=self.dim_order)

    def bound(self, shape: tuple[int, ...]) -> "DecodedTensor":
        """The same as a tensor of that shape, which headers may leave open.

        Raises:
            QuantizationError: the stored parts are of another shape.
        """
        order = dim_order_of(self.weight, shape)
        return dataclasses.replace(self, weight=self.weight.bind(shape), shape=shape, dim_order=order)

    def whole_box(self, box: Box) -> Box:
        """The box of the weight with its dims together that has all of `box`; more than that where a dim is cut inside."""
        plain = self._plain(box)
        if not self.splits:
            return plain
        outer = []
        for sizes, ranges in self._grouped(plain):
            inner = math.prod(sizes[1:])
            outer.append((ranges[0][0] * inner, ranges[0][1] * inner))
        return tuple(outer)

    def stored_boxes(self, box: Box) -> Mapping[str, Box]:
        """The box of each part, by role, that the values in `box` are decoded from."""
        return self.weight.boxes(self.whole_box(box))

    def decode(self, arrays: Mapping[str, np.ndarray], box: Box, into: np.ndarray) -> None:
        """Decode the values of `box` into an array of its shape.

        Args:
            arrays: values of the parts, by role, in `stored_boxes(box)`.
            box: box of this tensor, its dims split and in `order`.
            into: array that gets the values, of any floating dtype.

        Raises:
            QuantizationError: a scale is zero or not finite.
        """
        outer = self.whole_box(box)
        if self.order is not None:
            into = into.transpose(inverse(self.order))
        if not self.splits:
            self.decode_into(arrays, outer, into)
            return
        values = self.decode_whole(arrays, outer, into.dtype)
        shape: list[int] = []
        index: list[slice] = []
        for sizes, ranges in self._grouped(self._plain(box)):
            shape += [ranges[0][1] - ranges[0][0], *sizes[1:]]
            index += [slice(None), *[slice(*each) for each in ranges[1:]]]
        into[...] = values.reshape(shape)[tuple(index)]

    def decode_into(self, arrays: Mapping[str, np.ndarray], box: Box, into: np.ndarray) -> None:
        """Decode a box whose dims are together into an array of its shape."""
        self.weight.decode(arrays, box, out=into)

    def decode_whole(self, arrays: Mapping[str, np.ndarray], box: Box, dtype: np.dtype) -> np.ndarray:
        """The values of a box whose dims are together."""
        return self.weight.decode(arrays, box, dtype=dtype)

    def _plain(self, box: Box) -> Box:
        """A box with its dims in the order of the weight's."""
        return box if self.order is None else tuple([box[place] for place in inverse(self.order)])

    def _grouped(self, box: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
        """For each dim of the weight the sizes that it is split in, and the ranges of `box` along these."""
        start = 0
        for sizes in self.splits:
            yield sizes, box[start : start + len(sizes)]
            start += len(sizes)


class DecodedCheckpoint(NamedTuple):
    """A checkpoint whose quantized weights are `DecodedTensor`s.

    Attributes:
        checkpoint: tensors, each quantized weight under the name of the plain one.
        unread: stored tensors that belong to the quantization and no value depends on, such as scales of activations.
        formats: {format and its settings: weights that have it}.
        notes: sentences for a report.
    """

    checkpoint: Checkpoint
    unread: frozenset[str] = frozenset()
    formats: Mapping[str, int] = {}
    notes: tuple[str, ...] = ()


def decode_checkpoint(checkpoint: Checkpoint) -> DecodedCheckpoint:
    """Find the quantized weights of a checkpoint, by its settings and its headers; no value is read.

    A config.json that still names a format beside weights which are plain again is no error.

    Raises:
        QuantizationError: it is quantized in a way that jaxmoe does not decode, or settings and tensors disagree.
    """
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    tensors = checkpoint.tensors
    if all(tensor.dtype is not None and can_cast(tensor.dtype, _FLOAT32) for tensor in tensors.values()):
        return DecodedCheckpoint(checkpoint)
    matched = match_tensors(tensors, read_quantization(directory))
    plain = {name: tensor for name, tensor in tensors.items() if name not in matched.parts or name in matched.unused}
    plain |= {name: _decoded(weight, tensors) for name, weight in matched.weights.items()}
    counts = Counter([weight.format for weight in matched.weights.values()])
    formats = {form.describe(): count for form, count in counts.items()}
    return DecodedCheckpoint(
        dataclasses.replace(checkpoint, tensors=plain), frozenset(matched.unused), formats, matched.notes
    )


@lru_cache
def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The place of each dim in an order of dims.

    >>> inverse((2, 0, 1))
    (1, 2, 0)
    """
    return tuple([order.index(dim) for dim in range(len(order))])


def dim_order_of(weight: QuantizedWeight, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The order in which the dims of a plain tensor of a shape lie where a weight is stored, as `TensorInfo.dim_order`."""
    if not weight.format.transposed or not shape:
        return None
    *lead, inputs, outputs = range(len(shape))
    return (*lead, outputs, inputs)


def _decoded(weight: QuantizedWeight, tensors: Mapping[str, TensorInfo]) -> DecodedTensor:
    roles = {part.role for part in weight.format.parts if part.decoded}
    parts = {role: tensors[header.name] for role, header in weight.stored.items()}
    first = parts[weight.format.parts[0].role]
    return DecodedTensor(
        name=weight.name,
        dtype_name=weight.format.name,
        dtype=_FLOAT32,
        shape=weight.shape or (),
        dim_order=dim_order_of(weight, weight.shape or ()),
        file=first.file,
        offset=first.offset,
        nbytes=sum(part.nbytes for role, part in parts.items() if role in roles),
        weight=weight,
        parts=parts,
    )
