"""Tiles over rows that stay where they are."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT, tile_groups

GROUPS = 6
tiles_of_rows = jax.jit(tile_groups, static_argnums=(1, 2))


@given(
    sizes=st.lists(st.integers(0, 40), min_size=GROUPS, max_size=GROUPS),
    R=st.sampled_from([1, 93, 256]),
    m=st.sampled_from([8, 16, 64]),
)
def test_every_owned_row_is_in_one_tile_of_its_group(sizes, R, m) -> None:
    tiles = tiles_of_rows(jnp.asarray(sizes, jnp.int32), R, m)
    used = int(tiles.used[0])
    assert used <= len(tiles.groups)
    group_R = np.repeat(np.arange(GROUPS), sizes)[:R]  # sizes beyond the rows are cut
    covered = []
    for group, block, skip, size in zip(*(np.asarray(column)[:used] for column in tiles[:4]), strict=True):
        assert skip < ALIGNMENT
        assert 0 < size <= m - skip
        rows = np.arange(size) + block * ALIGNMENT + skip
        assert (group_R[rows] == group).all()
        covered.extend(rows)
    assert sorted(covered) == list(range(min(R, sum(sizes))))


def test_a_group_of_up_to_nine_rows_takes_one_tile_of_sixteen() -> None:
    for before in range(8):
        assert int(tile_groups(jnp.asarray([before, 9], jnp.int32), 17, 16).used[0]) == (2 if before else 1)
