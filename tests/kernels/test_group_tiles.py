"""The layout in which no tile has rows of two groups."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.kernels.grouped_matmul.group_tiles import lay_out


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    unowned=st.integers(0, 30),
    m=st.sampled_from([1, 8, 16, 64]),
)
def test_every_row_stands_in_a_tile_of_its_group_alone(sizes, unowned, m) -> None:
    R = max(1, sum(sizes) + unowned)
    layout = lay_out(jnp.asarray(sizes, jnp.int32), R, m)
    group_I, source = np.asarray(layout.groups), np.asarray(layout.source)
    assert int(layout.used[0]) == sum(-(-size // m) for size in sizes) <= len(group_I)
    np.testing.assert_array_equal(layout.owned, np.arange(R) < sum(sizes))
    group_R = np.repeat(np.arange(len(sizes)), sizes)
    placed = np.flatnonzero(source < R)
    # Each owned row once, in a used tile of its group, and where `place_R` says.
    np.testing.assert_array_equal(np.sort(source[placed]), np.arange(sum(sizes)))
    np.testing.assert_array_equal(group_I[placed // m], group_R[source[placed]])
    assert (placed // m < int(layout.used[0])).all()
    np.testing.assert_array_equal(np.asarray(layout.places)[source[placed]], placed)


def test_sizes_beyond_the_rows_are_cut() -> None:
    layout = lay_out(jnp.asarray([3, 9], jnp.int32), 5, 4)
    assert np.asarray(layout.owned).all()
    assert sorted(np.asarray(layout.source)[np.asarray(layout.source) < 5]) == [0, 1, 2, 3, 4]
