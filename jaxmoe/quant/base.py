"""The contract of a quantized format: names of its tensors, their shapes, the parts that a box needs, and its values."""

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, TypeAlias

import numpy as np

from jaxmoe.quant.activations import Activations
from jaxmoe.quant.packing import Packing

Shape: TypeAlias = tuple[int, ...]
# A half-open range per dim.
Box: TypeAlias = tuple[tuple[int, int], ...]
Arrays: TypeAlias = Mapping[str, np.ndarray]
Shapes: TypeAlias = Mapping[str, Shape]

# Elements that are decoded at a time: few enough for a core's cache, and enough for what a tile costs besides.
_TILE = 1 << 19
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16}


@dataclasses.dataclass(frozen=True)
class Part:
    """One stored tensor of a quantized weight.

    Attributes:
        role: key of the part in a format's mappings.
        suffixes: ends of its name in place of the weight's ".weight", the usual one first.
        dtypes: element types of safetensors that it may have, the usual one first.
        required: whether a weight is incomplete without it.
        decoded: whether values depend on it; scales of activations are read only where these are quantized.
    """

    role: str
    suffixes: tuple[str, ...]
    dtypes: tuple[str, ...]
    required: bool = True
    decoded: bool = True

    def names(self, weight: str) -> list[str]:
        """The names that this part of a weight may have.

        Args:
            weight: name that the tensor has where it is not quantized.

        >>> Part("scale", (".weight_scale_inv",), ("F32",)).names("mlp.experts.0.up_proj.weight")
        ['mlp.experts.0.up_proj.weight_scale_inv']
        >>> Part("scale", (".weight_scale_inv",), ("F32",)).names("mlp.experts.down_proj")
        ['mlp.experts.down_proj_scale_inv', 'mlp.experts.down_proj_weight_scale_inv']
        """
        if weight.endswith(".weight"):
            return [weight.removesuffix(".weight") + suffix for suffix in self.suffixes]
        # A parameter that is no module's "weight": its parts are attributes beside it.
        found = []
        for suffix in self.suffixes:
            rest = suffix.removeprefix(".weight")
            found += [weight + rest, f"{weight}_weight{rest}"] if rest != suffix else []
            found += [] if rest != suffix else [f"{weight}_{suffix[1:]}", weight + suffix]
        return list(dict.fromkeys(found))


def scale_of_activations(*suffixes: str) -> Part:
    """The part that holds a static scale of a module's inputs, which values do not depend on."""
    return Part("input_scale", suffixes, ("F32", "BF16", "F16"), required=False, decoded=False)


@dataclasses.dataclass(frozen=True)
class QuantFormat(abc.ABC):
    """A way to store one weight in several tensors: their names, dtypes and shapes, and its values.

    A format is a frozen dataclass whose fields are a checkpoint's settings (block sizes, bits), so that formats compare
    by value. It describes matrices [..., N, K] as torch has them, outputs first. Where `transposed`, the tensor that a
    plain checkpoint has in its place is [..., K, N], and callers of `QuantizedWeight` see that one.

    A subclass says four things: `shapes`, `shape_of`, `boxes` and `values`; one whose weights can stay packed on devices
    says two or three more, `packing`, `packed` and `values_as_stored`. A new format is one file with one, and one line in
    `jaxmoe.quant.formats.FORMATS`.

    Attributes:
        name: name of the format in reports and messages.
        parts: stored tensors; the first is the one with the values.
        transposed: whether the plain tensor is the transposed of the matrices.
        packed_from: parts that each array of a weight that stays packed is made from, of those that are there.
        ranks: numbers of dims that the tensor with the values may have.
        activations: form that settings ask for of the inputs of such a weight, None where they ask for none. Formats are the
            same whatever it is.
    """

    activations: Activations | None = dataclasses.field(default=None, kw_only=True, compare=False)

    name: ClassVar[str]
    parts: ClassVar[tuple[Part, ...]]
    transposed: ClassVar[bool] = False
    packed_from: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "values": ("values",),
        "scale": ("scale",),
        "zero_point": ("zero_point",),
        "matrix_scale": ("global_scale",),
    }
    ranks: ClassVar[range] = range(2, 9)

    @abc.abstractmethod
    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        """The shapes that a part of matrices [..., N, K] may have, the usual one first."""

    @abc.abstractmethod
    def shape_of(self, stored: Shapes) -> Shape | None:
        """The shape [..., N, K] of the matrices by the shapes of their parts; None where these do not tell."""

    @abc.abstractmethod
    def boxes(self, box: Box, shape: Shape, stored: Shapes) -> dict[str, Box]:
        """The box of each decoded part that holds what `box` of the matrices is made of.

        Args:
            box: range of the matrices along each dim.
            shape: shape of the matrices, [..., N, K].
            stored: shape of every part that is there.
        """

    @abc.abstractmethod
    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        """The matrices' values in `box`, float32.

        Args:
            arrays: contents of the boxes that `boxes` names, by role.
            box: range of the matrices along each dim.
            shape: shape of the matrices, [..., N, K].
            stored: shape of every part that is there.
            out: contiguous float32 array of the box's shape, in which the result may be put: an array that is not made
                anew for each tile need not be mapped anew.
        """

    def scales(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """The scales among the parts that are given as numbers, which are to be finite and not zero."""
        return {role: array for role, array in arrays.items() if "scale" in role}

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        """The form in which such a weight can stay packed on a device; None where it has to be decoded.

        Args:
            dtypes: element type of every part that is there, by role.
            shape: shape of the matrices, [..., N, K].
        """
        return None

    def values_as_stored(self, shape: Shape) -> bool:
        """Whether the packed numbers of matrices [..., N, K] are the bytes of the stored tensor, in their order."""
        return False

    def packed(self, role: str, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        """An array of the form that `packing` names, for a box of the matrices.

        Args:
            role: name in `jaxmoe.quant.packing.PACKED_ROLES`.
            arrays: contents of the boxes that `boxes` names, by role; of those in `packed_from` alone.
            box: range of the matrices along each dim, of whole bytes of the packed form.
            shape: shape of the matrices, [..., N, K].
            stored: shape of every part that is there.

        Returns:
            Of "values" the packed numbers; of other roles the entry of every block that `box` touches.
        """
        raise NotImplementedError(f"{self.name} does not stay packed")

    def check_shape(self, shape: Shape) -> str | None:
        """The reason why no matrices [..., N, K] of this shape can be in this format; None if they can."""
        return None if len(shape) >= 2 else f"{self.name} holds matrices; this weight has shape {shape}"

    def stored_bytes(self, shape: Shape) -> int:
        """Bytes of a plain tensor of this shape as it is usually stored: those of the parts that every weight has."""
        matrices = swap_last(shape) if self.transposed else shape
        found = [(part.dtypes[0], self.shapes(part.role, matrices)) for part in self.parts if part.required]
        return sum(bytes_of(dtype, shapes[0]) for dtype, shapes in found if shapes)

    def describe(self) -> str:
        """The format and its settings in a few words."""
        settings = [
            f"{field.name} {value}"
            for field in dataclasses.fields(self)
            if field.compare and (value := getattr(self, field.name)) != field.default
        ]
        return " ".join([self.name, *(f"({', '.join(settings)})" for _ in settings[:1])])

    def decode(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> None:
        """Decode `box` into `out`, an array of the box's shape: in float32, then cast to what it has."""
        outer = self.boxes(box, shape, stored)
        scratch = np.empty(0, np.float32)
        for tile in _tiles(box):
            inner = self.boxes(tile, shape, stored)
            part = {role: arrays[role][within(inner[role], outer[role])] for role in inner}
            target, size = out[within(tile, box)], math.prod(extent(tile))
            if size > len(scratch):
                scratch = np.empty(size, np.float32)
            at_once = target.dtype == np.float32 and target.flags.c_contiguous
            place = target if at_once else scratch[:size].reshape(target.shape)
            found = self.values(part, tile, shape, stored, place)
            if not at_once or found is not target:
                target[...] = found


def bytes_of(dtype: str, shape: Shape) -> int:
    """Bytes of a tensor of an element type of safetensors."""
    return math.prod(shape) * _BITS.get(dtype, 8) // 8


def whole(shape: Shape) -> Box:
    """The box of a whole array."""
    return tuple((0, size) for size in shape)


def extent(box: Box) -> Shape:
    """The shape of a box."""
    return tuple(stop - start for start, stop in box)


def within(inner: Box, outer: Box) -> tuple[slice, ...]:
    """The index of `inner` in an array of what is in `outer`."""
    return tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, outer, strict=True))


def ceil_div(size: int, by: int) -> int:
    """`size / by`, rounded up."""
    return -(-size // by)


def swap_last(items: tuple) -> tuple:
    """A shape or box with its last two dims swapped."""
    return (*items[:-2], items[-1], items[-2])


def _tiles(box: Box) -> Iterator[Box]:
    """Parts of a box of about `_TILE` elements each, whole rows where those are not longer."""
    total = math.prod(extent(box))
    dim = next((dim for dim, size in enumerate(extent(box)[:-1]) if size > 1), None)
    if total <= _TILE or dim is None:
        yield box
        return
    start, stop = box[dim]
    step = max(1, _TILE * (stop - start) // total)
    for first in range(start, stop, step):
        yield from _tiles((*box[:dim], (first, min(first + step, stop)), *box[dim + 1 :]))
