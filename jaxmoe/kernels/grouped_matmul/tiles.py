"""Cutting rows sorted by group into tiles, each within one group, and a loop over the tiles that hold rows."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# Up to this many rows a group on average, a tile is a single row: padding tiles would cost more than reading the
# matrix again, out of cache, for the few groups that have several rows.
SINGLE_ROW_LIMIT = 4
# Rows a tile above that. Small tiles read the matrix too often; tiles larger than a typical group multiply padding,
# and the number of rows allocated may be several times the number filled.
MIN_TILE, MAX_TILE = 8, 64


def rows_per_tile(R: int, G: int) -> int:
    """Tile height for R allocated rows in G groups: 1, or a power of two that fits a group of average size."""
    if R <= SINGLE_ROW_LIMIT * G:
        return 1
    tile = MIN_TILE
    while 2 * tile <= min(R // G, MAX_TILE):
        tile *= 2
    return min(tile, R)


def map_tiles(
    tile_fn: Callable[[jax.Array, jax.Array], jax.Array],
    x_RK: jax.Array,
    group_sizes_G: jax.Array,
    out: jax.ShapeDtypeStruct,
    *,
    varying: frozenset[str],
) -> jax.Array:
    """Apply `tile_fn(group, x_mK) -> y_mN` to every tile of rows, and nothing to the rows that no group owns.

    Trips of the loop: at most sum(ceil(group_sizes / m)), with m = `rows_per_tile`; neither R nor G adds any.

    Args:
        tile_fn: must treat rows independently, for a tile at a group's border also holds its neighbours' rows.
        x_RK: rows sorted by group.
        group_sizes_G: rows of each group.
        out: shape [R, N] and dtype of the result.
        varying: mesh axes over which the result varies, see `varying_axes`.

    Returns:
        out_RN, zeros where no group owns the row.
    """
    R, G = x_RK.shape[0], group_sizes_G.shape[0]
    m = rows_per_tile(R, G)
    end_G = jnp.minimum(jnp.cumsum(group_sizes_G), R)
    # Non-empty groups in order: a tile that reaches the end of its group passes on to the next of these.
    group_G = jnp.sort(jnp.where(group_sizes_G > 0, jnp.arange(G, dtype=jnp.int32), G - 1))

    def body(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        row, i, out_RN = carry
        group = group_G[i]
        end = end_G[group]
        # The last tile of all may not stick out below row R: it starts earlier instead, and the mask does the rest.
        first = jnp.minimum(row, R - m)
        y_mN = tile_fn(group, lax.dynamic_slice_in_dim(x_RK, first, m)).astype(out_RN.dtype)
        if m > 1:
            row_m = first + jnp.arange(m, dtype=jnp.int32)
            own_m1 = ((row_m >= row) & (row_m < end))[:, None]
            y_mN = jnp.where(own_m1, y_mN, lax.dynamic_slice_in_dim(out_RN, first, m))
        out_RN = lax.dynamic_update_slice_in_dim(out_RN, y_mN, first, 0)
        next_row = jnp.minimum(row + m, end)
        return next_row, i + (next_row == end), out_RN

    row_axes = varying_axes(group_sizes_G)
    row = _mark_varying(jnp.int32(0), row_axes)
    i = _mark_varying(jnp.int32(0), row_axes)
    out_RN = _mark_varying(jnp.zeros(out.shape, out.dtype), varying)
    return lax.while_loop(lambda carry: carry[0] < end_G[-1], body, (row, i, out_RN))[2]


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes, inside `shard_map`, over which a function of these arrays varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def _mark_varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Type a constant as varying: `shard_map` wants a loop's carry to have one type from start to end."""
    return lax.pcast(array, tuple(axes), to="varying") if axes else array
