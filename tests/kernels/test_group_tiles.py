"""Tiles over rows that stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT, map_tiles
from tests.support.group_tiles import row_tiles

GROUPS = 6
map_of = jax.jit(map_tiles, static_argnums=(1, 2))


@given(
    sizes=st.lists(st.integers(0, 40), min_size=GROUPS, max_size=GROUPS),
    R=st.sampled_from([1, 93]),
    m=st.sampled_from([8, 64]),
)
def test_every_owned_row_is_in_one_tile_of_its_group(sizes, R, m) -> None:
    check(sizes, R, m)


@pytest.mark.parametrize("G", [1, 2, 15, 16, 17, 32, 33, 128])
def test_any_number_of_groups(G) -> None:
    """Sizes are read sixteen at a time, and searched by halves."""
    rng = np.random.default_rng(G)
    for sizes in (rng.integers(0, 20, G) * rng.integers(0, 2, G), np.zeros(G, int), np.eye(G, dtype=int)[-1]):
        check(sizes.tolist(), 20 * G, 16)


def check(sizes, R, m) -> None:
    tiles = row_tiles(sizes, R, m)
    group_I, block_I, skip_I, size_I, used = (
        np.asarray(column) for column in map_of(jnp.asarray(sizes, jnp.int32), R, m)
    )
    mapped = np.stack([group_I, block_I * ALIGNMENT, skip_I, skip_I + size_I], 1)[: used[0]]
    assert mapped.tolist() == tiles
    group_R = np.repeat(np.arange(len(sizes)), sizes)[:R]  # sizes beyond the rows are cut
    covered = []
    for group, row, first, last in tiles:
        assert row % ALIGNMENT == 0
        assert 0 <= first < ALIGNMENT
        assert first < last <= m
        rows = np.arange(first, last) + row
        assert (group_R[rows] == group).all()
        covered.extend(rows)
    assert covered == list(range(min(R, sum(sizes))))


def test_a_group_of_up_to_nine_rows_takes_one_tile_of_sixteen() -> None:
    for before in range(8):
        assert len(row_tiles([before, 9], 17, 16)) == (2 if before else 1)
