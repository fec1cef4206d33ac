"""Boxes of array elements: their common parts, the parts of an array that they cover, and the union of several.

A box is a half-open range per dim, ``((start, stop), ...)``.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

Box = tuple[tuple[int, int], ...]


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole array."""
    return tuple([(0, size) for size in shape])


def box_of(index: Sequence[slice], shape: Sequence[int]) -> Box:
    """The box that an index of slices, such as a shard's, takes of an array of `shape`."""
    return tuple([part.indices(size)[:2] for part, size in zip(index, shape, strict=True)])


def box_shape(box: Box) -> tuple[int, ...]:
    """Extent of `box` along each dim."""
    return tuple([stop - start for start, stop in box])


def volume(box: Box) -> int:
    """Elements in `box`."""
    return math.prod([stop - start for start, stop in box])


def contains(outer: Box, inner: Box) -> bool:
    """Whether `inner` lies in `outer`."""
    return all(a <= start and stop <= b for (a, b), (start, stop) in zip(outer, inner, strict=True))


def intersect(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, None where there is none."""
    result = []
    for (start_a, stop_a), (start_b, stop_b) in zip(a, b, strict=True):
        start = start_a if start_a > start_b else start_b
        stop = stop_a if stop_a < stop_b else stop_b
        if start >= stop:
            return None
        result.append((start, stop))
    return tuple(result)


def contiguous_suffix(box: Box, shape: Sequence[int]) -> int:
    """First dim from which `box` is whole in an array of `shape`; the dim before it may be a range of whole rows."""
    dim = len(shape)
    while dim and box[dim - 1] == (0, shape[dim - 1]):
        dim -= 1
    return dim


def is_contiguous(box: Box, shape: Sequence[int]) -> bool:
    """Whether the elements of `box` are next to each other in a row-major array of `shape`."""
    partial = contiguous_suffix(box, shape) - 1
    return all(stop - start == 1 for start, stop in box[: max(partial, 0)])


def join_dims(box: Box, split: Sequence[Sequence[int]]) -> Box:
    """The smallest box of an array that holds `box` of the same array with its dims split.

    Args:
        box: region of the split array.
        split: dims that each dim of the array is split in, outermost first.
    """
    dims, joined = iter(box), []
    for sizes in split:
        part = [next(dims) for _ in sizes]
        strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
        outer = first_extended(part)
        start = sum(first * stride for (first, _), stride in zip(part[: outer + 1], strides, strict=False))
        joined.append((start, start + (part[outer][1] - part[outer][0]) * strides[outer]))
    return tuple(joined)


def first_extended(box: Sequence[tuple[int, int]]) -> int:
    """The first dim along which `box` has more than one element, or the last dim."""
    return next((dim for dim, (start, stop) in enumerate(box) if stop - start > 1), len(box) - 1)


class Cover:
    """The count of boxes over each element of an array, on the grid that the boxes' edges make.

    Attributes:
        edges: sorted positions at which a box or the array starts or ends, one list per dim.
        counts: boxes over each cell of that grid.
    """

    def __init__(self, shape: Sequence[int], boxes: Sequence[Box]) -> None:
        self.edges = [sorted({0, size}.union(*[box[dim] for box in boxes])) for dim, size in enumerate(shape)]
        places = [{edge: place for place, edge in enumerate(edges)} for edges in self.edges]
        # A zero-sized dim has one edge and no cell: nothing to cover.
        self.counts = np.zeros([len(edges) - 1 for edges in self.edges], np.int32)
        for box in boxes:
            self.counts[tuple(slice(place[a], place[b]) for place, (a, b) in zip(places, box, strict=True))] += 1

    def volume(self) -> int:
        """Elements that at least one box covers."""
        sizes = [np.diff(edges) for edges in self.edges]
        return int(sum(math.prod(s[i] for s, i in zip(sizes, cell, strict=True)) for cell in np.argwhere(self.counts)))

    def first(self, bad: np.ndarray) -> Box:
        """The first cell for which `bad`, of the shape of `counts`, is true."""
        return tuple((edges[i], edges[i + 1]) for edges, i in zip(self.edges, np.argwhere(bad)[0], strict=True))


@lru_cache(maxsize=4096)
def union_volume(shape: tuple[int, ...], boxes: tuple[Box, ...]) -> int:
    """Elements of an array of `shape` that at least one of `boxes` covers."""
    return volume(boxes[0]) if len(boxes) == 1 else Cover(shape, boxes).volume()


# The experts of a checkpoint repeat the same few patterns thousands of times: hence the caches.
@lru_cache(maxsize=4096)
def disjoint_union(boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    """Disjoint boxes with the same union as `boxes`, in row-major order.

    The result is cut at the edges of `boxes` where that costs nothing, that is along the outermost dim that has
    any extent, so that each part tends to have one destination. Along inner dims cells are joined, because
    every cut there turns one long run of bytes into many short ones.
    """
    return tuple(_disjoint(boxes, outermost=True))


def _disjoint(boxes: tuple[Box, ...], *, outermost: bool) -> list[Box]:
    if not boxes[0]:
        return [()]
    slabs: list[tuple[int, int, list[Box]]] = []
    for start, stop in pairwise(sorted({edge for box in boxes for edge in box[0]})):
        tails = tuple(dict.fromkeys(box[1:] for box in boxes if box[0][0] <= start and stop <= box[0][1]))
        if not tails:
            continue
        inner = _disjoint(tails, outermost=outermost and stop - start == 1)
        if slabs and not outermost and slabs[-1][1] == start and slabs[-1][2] == inner:
            slabs[-1] = (slabs[-1][0], stop, inner)
        else:
            slabs.append((start, stop, inner))
    return [((start, stop), *box) for start, stop, inner in slabs for box in inner]


@lru_cache(maxsize=4096)
def split(box: Box, max_volume: int) -> tuple[Box, ...]:
    """Cut `box` into parts of at most `max_volume` elements, keeping runs of bytes as long as possible."""
    total = volume(box)
    if total <= max_volume:
        return (box,)
    dim = next(dim for dim, (start, stop) in enumerate(box) if stop - start > 1)
    start, stop = box[dim]
    rows = max(1, max_volume * (stop - start) // total)
    parts: list[Box] = []
    for first in range(start, stop, rows):
        parts += split((*box[:dim], (first, min(first + rows, stop)), *box[dim + 1 :]), max_volume)
    return tuple(parts)


def runs(rows: Sequence[int] | np.ndarray) -> list[tuple[int, int, int]]:
    """Find the runs of `rows` in which values count up by one, or are all negative.

    >>> runs([4, 5, -1, -1, 2])
    [(0, 4, 2), (2, -1, 2), (4, 2, 1)]

    Returns:
        First index, value there and length of each run.
    """
    values = np.asarray(rows, np.int64)
    before, after = values[:-1], values[1:]
    same_run = np.where(before < 0, after < 0, after == before + 1)
    starts = [0, *(np.flatnonzero(~same_run) + 1).tolist()]
    stops = [*starts[1:], len(values)]
    return [(start, int(values[start]), stop - start) for start, stop in zip(starts, stops, strict=True)]
