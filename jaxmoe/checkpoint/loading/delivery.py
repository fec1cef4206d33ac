"""The part of a chunk that a copy takes, and the shape in which the shard wants it."""

from typing import Any, NamedTuple

import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_shape, intersect
from jaxmoe.checkpoint.loading.plan import Copy


class Delivery(NamedTuple):
    """The part of one chunk that one copy takes.

    Attributes:
        shard: index of the shard.
        part: region of the tensor.
        shard_box: region of the shard.
        dims: shard dim that each tensor dim runs along, as in `Copy`.
    """

    shard: int
    part: Box
    shard_box: Box
    dims: tuple[int | None, ...]

    @property
    def in_order(self) -> bool:
        """Whether the elements come in the same order in the shard as in the tensor."""
        kept = [dim for dim in self.dims if dim is not None]
        return kept == sorted(kept)

    def take(self, values: np.ndarray, box: Box) -> np.ndarray:
        """View of `values`, the elements of `box`, that fits `shard_box`."""
        part = [slice(a - corner, b - corner) for (a, b), (corner, _) in zip(self.part, box, strict=True)]
        # With the ellipsis a scalar gives a view as well, and not its value.
        index: Any = (*part, ...)
        return _oriented(values[index], self.dims, box_shape(self.shard_box))


def deliver(copy: Copy, box: Box) -> Delivery | None:
    """The part that `copy` takes of the chunk of its tensor that is `box`, None where it takes nothing."""
    part = intersect(copy.tensor_box, box)
    if part is None:
        return None
    shard_box = [(start, start + 1) for start in copy.start]
    for (a, b), (corner, _), dim in zip(part, copy.tensor_box, copy.dims, strict=True):
        if dim is not None:
            shift = copy.start[dim] - corner
            shard_box[dim] = (a + shift, b + shift)
    return Delivery(copy.shard, part, tuple(shard_box), copy.dims)


def _oriented(values: np.ndarray, dims: tuple[int | None, ...], shape: tuple[int, ...]) -> np.ndarray:
    """A view of `values` (tensor dims) as an array of `shape` (shard dims); `dims` as in `Block`."""
    kept = [dim for dim in dims if dim is not None]
    sizes = [size for size, dim in zip(values.shape, dims, strict=True) if dim is not None]
    order = sorted(range(len(kept)), key=kept.__getitem__)
    # Only dims of size 1 come and go in these reshapes: neither copies.
    return values.reshape(sizes).transpose(order).reshape(shape)
