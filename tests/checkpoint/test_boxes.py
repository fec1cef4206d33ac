"""Covers and unions of boxes, against masks of every element."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.checkpoint.boxes import (
    Cover,
    contains,
    disjoint_union,
    intersect,
    is_contiguous,
    split,
    union_volume,
    volume,
    whole,
)


@st.composite
def arrays_and_boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=3)))
    span = [
        st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(lambda p: (p[0], max(p[0] + 1, p[1]))) for n in shape
    ]
    return shape, draw(st.lists(st.tuples(*span), min_size=1, max_size=5))


def count(shape, boxes) -> np.ndarray:
    counts = np.zeros(shape, int)
    for box in boxes:
        counts[tuple(slice(a, b) for a, b in box)] += 1
    return counts


@given(arrays_and_boxes())
def test_union_is_disjoint_and_complete(case):
    shape, boxes = case
    parts = disjoint_union(tuple(boxes))
    np.testing.assert_array_equal(count(shape, parts), count(shape, boxes) > 0)
    assert union_volume(shape, tuple(boxes)) == sum(map(volume, parts)) == (count(shape, boxes) > 0).sum()


@given(arrays_and_boxes())
def test_cover_counts_like_a_mask(case):
    shape, boxes = case
    cover, counts = Cover(shape, boxes), count(shape, boxes)
    assert (cover.counts == 0).any() == (counts == 0).any()
    assert (cover.counts > 1).any() == (counts > 1).any()
    if (counts > 1).any():
        twice = cover.first(cover.counts > 1)
        assert (counts[tuple(slice(a, b) for a, b in twice)] > 1).all()


@given(arrays_and_boxes(), st.integers(1, 20))
def test_split_parts_are_small_and_complete(case, limit):
    shape, (box, *_) = case
    parts = split(box, limit)
    np.testing.assert_array_equal(count(shape, parts), count(shape, [box]))
    assert all(volume(part) <= limit for part in parts)


@given(arrays_and_boxes())
def test_contiguous_is_what_numpy_says(case):
    shape, (box, *_) = case
    view = np.empty(shape, np.uint8)[(*[slice(a, b) for a, b in box], ...)]
    assert is_contiguous(box, shape) == view.flags.c_contiguous


@given(arrays_and_boxes())
def test_intersections(case):
    shape, boxes = case
    common = intersect(boxes[0], boxes[-1])
    both = (count(shape, boxes[:1]) > 0) & (count(shape, boxes[-1:]) > 0)
    np.testing.assert_array_equal(count(shape, [] if common is None else [common]), both)
    assert contains(whole(shape), boxes[0])


def test_columns_that_are_all_needed_are_read_as_one():
    assert disjoint_union((((0, 9), (0, 4)), ((0, 9), (4, 8)))) == (((0, 9), (0, 8)),)


def test_rows_are_cut_where_another_shard_begins():
    assert disjoint_union((((0, 4), (0, 8)), ((4, 9), (0, 8)))) == (((0, 4), (0, 8)), ((4, 9), (0, 8)))
