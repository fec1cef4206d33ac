"""Rows that each tile of a kernel covers, where rows are sorted by group and stay where they are.

A tile begins at a multiple of 8 rows, for the tensor memory accelerator copies rows in blocks of 8, so a group's first tile
may begin with up to 7 rows of the group before. `skip` and `size` say which of a tile's rows are its group's own.
Letters here, beside the common ones of docs/concepts/letters.md: G groups, I tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

ALIGNMENT = 8


class GroupTiles(NamedTuple):
    """The tiles of one call; those beyond the `used` first ones have nothing to do.

    Attributes:
        groups: int32 [I], the group of each tile.
        blocks: int32 [I], the row that each tile begins at, in units of `ALIGNMENT`.
        skips: int32 [I], rows of each tile that belong to groups before.
        sizes: int32 [I], rows of each tile that are its group's own; they follow those.
        used: int32 [1], number of tiles with rows of their own.
    """

    groups: jax.Array
    blocks: jax.Array
    skips: jax.Array
    sizes: jax.Array
    used: jax.Array


def tile_groups(group_sizes_G: jax.Array, R: int, m: int) -> GroupTiles:
    """Tiles of `m` rows, a multiple of 8, over R rows in groups of those sizes.

    A group of s rows takes at most ceil((s + 7) / m) tiles, so there are never more than (R + 7 G) / m + G of them.
    """
    G = group_sizes_G.shape[0]
    I = (R + (ALIGNMENT - 1) * G) // m + G  # noqa: E741
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G, dtype=jnp.int32), R)
    starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]])
    aligned_G = starts_G // ALIGNMENT * ALIGNMENT
    tiles_G = jnp.where(ends_G > starts_G, -(-(ends_G - aligned_G) // m), 0)
    tile_ends_G = jnp.cumsum(tiles_G, dtype=jnp.int32)
    # All comparisons at once: a search would be a loop of small kernels.
    group_I = jnp.minimum(
        jnp.searchsorted(tile_ends_G, jnp.arange(I, dtype=jnp.int32), side="right", method="compare_all"), G - 1
    )
    row_I = aligned_G[group_I] + (jnp.arange(I, dtype=jnp.int32) - (tile_ends_G - tiles_G)[group_I]) * m
    first_I = jnp.maximum(row_I, starts_G[group_I])
    size_I = jnp.clip(jnp.minimum(row_I + m, ends_G[group_I]) - first_I, 0, m)
    # A sum and not the last of the running ones, which would be sliced by a kernel of its own.
    used = jnp.sum(tiles_G, keepdims=True)
    columns = (group_I, row_I // ALIGNMENT, first_I - row_I, size_I, used)
    return GroupTiles(*(column.astype(jnp.int32) for column in columns))
