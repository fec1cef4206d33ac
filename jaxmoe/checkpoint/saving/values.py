"""The sources of the values that a writer writes: the arrays of a model, or another checkpoint."""

import bisect
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_of, box_shape, intersect, whole
from jaxmoe.checkpoint.formats import read_tensor
from jaxmoe.checkpoint.mapping import Block, MappedCheckpoint
from jaxmoe.layers.weights import PART_ENDINGS
from jaxmoe.quant.packing import Packing
from jaxmoe.quant.unpack import packed_boxes, unpack


class Values(Protocol):
    """The values of a model's parameters, wherever they are."""

    def read(self, path: str, box: Box) -> np.ndarray:
        """The values of a region of a parameter, in host memory; not to be written to."""

    def dtype(self, path: str, box: Box) -> np.dtype:
        """The type that these values are held in."""

    def input_scale(self, path: str, box: Box) -> float | None:
        """The static scale that inputs of these values are rounded to fp8 by; None where they have none."""


class ModelValues:
    """Values of a model on its mesh, fetched region by region; those of packed parameters are decoded in float32.

    Args:
        arrays: arrays of the parameters by path, all of them on devices of this process.
        packings: forms of those that are packed, by path.
    """

    def __init__(self, arrays: Mapping[str, jax.Array], packings: Mapping[str, Packing] | None = None) -> None:
        self._parts = {path: _distinct_parts(array) for path, array in arrays.items()}
        self._shapes = {path: array.shape for path, array in arrays.items()}
        self._packings = packings or {}
        self._input_scales: dict[str, np.ndarray] = {}

    def dtype(self, path: str, box: Box) -> np.dtype:
        """See `Values`."""
        del box
        return np.dtype(np.float32) if path in self._packings else self._held_dtype(path)

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Values`."""
        packing = self._packings.get(path)
        if packing is None:
            return self._fetch(path, box)
        *lead, width = self._shapes[path]
        shape = (*lead, width * packing.per_byte)
        boxes = packed_boxes(packing, box, shape)
        return unpack(
            packing, {role: self._fetch(path + PART_ENDINGS[role], boxes[role]) for role in boxes}, box, shape
        )

    def input_scale(self, path: str, box: Box) -> float | None:
        """See `Values`."""
        packing = self._packings.get(path)
        if packing is None or packing.activations != "fp8_static":
            return None
        scales = path + PART_ENDINGS["input_scale"]
        # A few bytes a layer, fetched once for all of its experts.
        if scales not in self._input_scales:
            self._input_scales[scales] = self._fetch(scales, whole(self._shapes[scales]))
        found = self._input_scales[scales]
        return float(np.max(found[_slices(box[: found.ndim], ((0, 0),) * found.ndim)]))

    def _held_dtype(self, path: str) -> np.dtype:
        _, data = self._parts[path][0]
        return np.dtype(data.dtype)

    def _fetch(self, path: str, box: Box) -> np.ndarray:
        result = np.empty(box_shape(box), self._held_dtype(path))
        for place, data in self._parts[path]:
            common = intersect(place, box)
            if common is not None:
                result[_slices(common, box)] = _fetch(data, _shifted(common, place))
        return result


class CheckpointValues:
    """Values of a checkpoint, read region by region.

    Args:
        mapped: checkpoint, and the blocks by which it fills parameters.
        descriptors: its files, open for reading.
    """

    def __init__(self, mapped: MappedCheckpoint, descriptors: Mapping[Path, int]) -> None:
        self._tensors = mapped.checkpoint.tensors
        self._descriptors = descriptors
        self._blocks = {path: _Sorted(blocks) for path, blocks in mapped.blocks.items()}

    def dtype(self, path: str, box: Box) -> np.dtype:
        """See `Values`; where tensors of several dtypes are joined, one that holds all their values."""
        result: Any = None
        for block, _ in self._blocks[path].meeting(box):
            found = self._tensors[block.tensor].dtype if block.tensor is not None else None
            if found is not None and found != result:
                result = found if result is None else jnp.promote_types(result, found)
        return np.dtype(result)

    def read(self, path: str, box: Box) -> np.ndarray:
        """See `Values`."""
        result = np.zeros(box_shape(box), self.dtype(path, box))
        for block, common in self._blocks[path].meeting(box):
            if block.tensor is not None:
                result[_slices(common, box)] = self._read_block(block, common)
        return result

    def input_scale(self, path: str, box: Box) -> float | None:
        """See `Values`; values that are read from files have been decoded."""
        del path, box
        return None

    def _read_block(self, block: Block, part: Box) -> np.ndarray:
        """The values of `part` of the parameter, which lies in `block`, in the parameter's order of dims."""
        assert block.tensor is not None
        tensor_box = []
        for start, dim in zip(block.tensor_start, block.dims, strict=True):
            # A dim without a partner has one element.
            first, stop = (0, 1) if dim is None else _shifted(part, block.param_box)[dim]
            tensor_box.append((start + first, start + stop))
        tensor = self._tensors[block.tensor].split(block.tensor_split)
        values, _ = read_tensor(self._descriptors, tensor, tuple(tensor_box))
        kept = [dim for dim in block.dims if dim is not None]
        squeezed = values.reshape([size for size, dim in zip(values.shape, block.dims, strict=True) if dim is not None])
        return squeezed.transpose(np.argsort(kept)).reshape(box_shape(part))


class _Sorted:
    """The blocks of one parameter by where they start, so that those of a slot are found among thousands."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        # A scalar has no dim 0, and one block.
        self._blocks = sorted(blocks, key=lambda block: block.param_start[:1])
        self._starts = [block.param_start[:1] for block in self._blocks]
        self._longest = max((size for block in blocks for size in block.shape[:1]), default=1)

    def meeting(self, box: Box) -> list[tuple[Block, Box]]:
        """Blocks with some of `box` in them, and their common part."""
        first, stop = 0, len(self._blocks)
        if box:
            first = bisect.bisect_right(self._starts, (box[0][0] - self._longest,))
            stop = bisect.bisect_left(self._starts, (box[0][1],))
        common = [(block, intersect(block.param_box, box)) for block in self._blocks[first:stop]]
        return [(block, part) for block, part in common if part is not None]


def _distinct_parts(array: jax.Array) -> list[tuple[Box, jax.Array]]:
    """The parts that an array is in, each once however many devices hold it."""
    parts: dict[Box, jax.Array] = {}
    for shard in array.addressable_shards:
        parts.setdefault(box_of(shard.index, array.shape), shard.data)
    return list(parts.items())


def _fetch(data: jax.Array, box: Box) -> np.ndarray:
    """A region of an array on one device, in host memory."""
    if all(device.platform == "cpu" for device in data.devices()):
        return np.asarray(data)[_slices(box, ((0, 0),) * len(box))]  # a view
    # Cut on the device: the host copy of a whole array would stay with it for as long as it lives.
    starts = np.array([start for start, _ in box], np.int32)
    return np.asarray(_cut(data, starts, box_shape(box)))


@functools.partial(jax.jit, static_argnums=2)
def _cut(data: jax.Array, starts: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(data, [starts[dim] for dim in range(data.ndim)], shape)


def _shifted(part: Box, box: Box) -> Box:
    """`part`, counted from the corner of `box`."""
    return tuple([(start - corner, stop - corner) for (start, stop), (corner, _) in zip(part, box, strict=True)])


def _slices(part: Box, box: Box) -> Any:
    # With the ellipsis a scalar gives a view as well, and not its value.
    return (*[slice(start, stop) for start, stop in _shifted(part, box)], ...)
