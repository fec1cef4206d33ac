"""Rows laid out so that no tile has rows of two groups: what a kernel of fixed tiles works on.

Each group begins at a multiple of `m` rows and is filled up with zeros. The number of tiles is fixed by shapes;
those beyond the last filled one have nothing to do. Letters beyond the design's: I tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class GroupTiles(NamedTuple):
    """The layout of one call.

    Attributes:
        groups: int32 [I], the group of each tile.
        used: int32 [1], tiles that have rows; they are the first ones.
        source: int32 [I·m], the row that each place holds; R, out of bounds, where it holds none.
        places: int32 [R], where each row stands; the first place for rows that no group owns.
        owned: bool [R], whether a group owns the row.
    """

    groups: jax.Array
    used: jax.Array
    source: jax.Array
    places: jax.Array
    owned: jax.Array


def lay_out(group_sizes_G: jax.Array, R: int, m: int) -> GroupTiles:
    """Tiles of `m` rows for R rows in groups of those sizes.

    Σ ceil(s / m) is at most ceil(R / m) + G - 1, whatever the sizes.
    """
    G = group_sizes_G.shape[0]
    I = -(-R // m) + G - 1  # noqa: E741
    ends_G = jnp.minimum(jnp.cumsum(group_sizes_G), R)
    starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_G[:-1]])
    tile_ends_G = jnp.cumsum(-(-(ends_G - starts_G) // m))
    tile_starts_G = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_ends_G[:-1]])
    group_I = jnp.minimum(jnp.searchsorted(tile_ends_G, jnp.arange(I), side="right"), G - 1).astype(jnp.int32)
    inside_Im = (jnp.arange(I) - tile_starts_G[group_I])[:, None] * m + jnp.arange(m)
    row_Im = starts_G[group_I][:, None] + inside_Im
    source_Im = jnp.where((inside_Im >= 0) & (row_Im < ends_G[group_I][:, None]), row_Im, R)
    row_R = jnp.arange(R)
    group_R = jnp.minimum(jnp.searchsorted(ends_G, row_R, side="right"), G - 1)
    owned_R = row_R < ends_G[-1]
    place_R = jnp.where(owned_R, tile_starts_G[group_R] * m + row_R - starts_G[group_R], 0)
    return GroupTiles(
        group_I,
        tile_ends_G[-1:].astype(jnp.int32),
        source_Im.reshape(-1).astype(jnp.int32),
        place_R.astype(jnp.int32),
        owned_R,
    )
