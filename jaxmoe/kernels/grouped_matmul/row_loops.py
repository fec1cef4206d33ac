"""Loops over rows sorted by group, which are cut into tiles, each within one group; tiles without rows are left out.

A trip costs the part of a large array that it reads or writes, and not the whole. XLA for CPU (jax 0.10) does in float32
what it has no bfloat16 instruction for, slices and updates among it. Left to itself it converts a stack of matrices as a
whole ahead of the loop, in twice its memory, and an array of results as a whole in every trip; the functions at the end of
this file keep it from that.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, K and N inner and outer dim, m rows of a
tile.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.numerics import zeros_behind

# Up to this many rows a group on average, a tile is a single row: padding tiles would cost more than reading the
# matrix again, out of cache, for the few groups that have several rows.
SINGLE_ROW_LIMIT = 2
# Above that, a tile has five eighths of an average group's rows: two tiles then hold a group that is up to a quarter
# larger than the average, and little of them is padding. Lower tiles multiply badly; higher ones pad small groups.
MIN_TILE, MAX_TILE = 8, 128


def rows_per_tile(R: int, G: int) -> int:
    """Tile height for R allocated rows in G groups: 1, or a multiple of 8."""
    if R <= SINGLE_ROW_LIMIT * G:
        return 1
    wanted = R * 5 // (G * 8) // MIN_TILE * MIN_TILE
    return min(R, max(MIN_TILE, min(wanted, MAX_TILE)))


def map_rows(
    row_fn: Callable[[jax.Array, jax.Array], jax.Array],
    x_RK: jax.Array,
    group_sizes_G: jax.Array,
    out: jax.ShapeDtypeStruct,
    *,
    varying: frozenset[str],
) -> jax.Array:
    """Apply `row_fn(group, x_1K) -> y_1N` to every row that a group owns, one trip of a loop each.

    The loop is flat. XLA would hoist out of an inner loop over a group's rows what `row_fn` reads of the group's
    matrix, and so copy it.

    Args:
        row_fn: function from a group and one of its rows to a row of the result.
        x_RK: rows sorted by group.
        group_sizes_G: rows of each group.
        out: shape [R, N] and dtype of the result.
        varying: mesh axes over which the result varies, see `varying_axes`.

    Returns:
        out_RN, zeros where no group owns the row.
    """
    _, end_G, group_G, _ = filled_groups(x_RK.shape[0], group_sizes_G)

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        row, i, bits_RN = carry
        group = group_G[i]
        y_1N = row_fn(group, lax.dynamic_slice_in_dim(x_RK, row, 1)).astype(out.dtype)
        bits_RN = lax.dynamic_update_slice_in_dim(bits_RN, to_bits(y_1N), row, 0)
        return row + 1, i + (row + 1 == end_G[group]).astype(jnp.int32), bits_RN

    row_axes = varying_axes(group_sizes_G)
    start: tuple[Any, ...] = (
        mark_varying(jnp.int32(0), row_axes),
        mark_varying(jnp.int32(0), row_axes),
        mark_varying(to_bits(zeros_behind(x_RK, out.shape, out.dtype)), varying),
    )
    return from_bits(lax.while_loop(lambda carry: carry[0] < end_G[-1], body, start)[2], out.dtype)


def map_tiles(
    load: Callable[[jax.Array], Any],
    tile_fn: Callable[[Any, jax.Array], jax.Array],
    x_RK: jax.Array,
    group_sizes_G: jax.Array,
    out: jax.ShapeDtypeStruct,
    *,
    varying: frozenset[str],
) -> jax.Array:
    """Apply `tile_fn(load(group), x_mK) -> y_mN` to every tile of rows, and nothing to the rows that no group owns.

    `load` is called once for a non-empty group, `tile_fn` ceil(size / m) times, with m = `rows_per_tile`; neither R
    nor G adds any.

    Args:
        load: function from a group to what its tiles share, such as its slice of a stack of matrices.
        tile_fn: function of those and rows. It must treat rows independently, for a tile at a group's border also holds its
            neighbors' rows.
        x_RK: rows sorted by group.
        group_sizes_G: rows of each group.
        out: shape [R, N] and dtype of the result.
        varying: mesh axes over which the result varies.

    Returns:
        out_RN, zeros where no group owns the row.
    """
    R, m = x_RK.shape[0], rows_per_tile(x_RK.shape[0], group_sizes_G.shape[0])
    start_G, end_G, group_G, filled = filled_groups(R, group_sizes_G)

    def one_group(i: jax.Array, bits_RN: jax.Array) -> jax.Array:
        group = group_G[i]
        start, end = start_G[group], end_G[group]
        # The barrier keeps the slice out of the inner loop, where it would be taken again for each tile.
        shared = lax.optimization_barrier(load(group))

        def one_tile(t: jax.Array, bits_RN: jax.Array) -> jax.Array:
            row = start + t * m
            # The last tile of all may not stick out below row R: it starts earlier instead, and the mask does the rest.
            first = jnp.minimum(row, R - m)
            y_mN = tile_fn(shared, lax.dynamic_slice_in_dim(x_RK, first, m)).astype(out.dtype)
            row_m = first + jnp.arange(m, dtype=jnp.int32)
            own_m1 = ((row_m >= row) & (row_m < end))[:, None]
            bits_mN = jnp.where(own_m1, to_bits(y_mN), lax.dynamic_slice_in_dim(bits_RN, first, m))
            return lax.dynamic_update_slice_in_dim(bits_RN, bits_mN, first, 0)

        return lax.fori_loop(0, (end - start + m - 1) // m, one_tile, bits_RN)

    zeros_RN = mark_varying(to_bits(zeros_behind(x_RK, out.shape, out.dtype)), varying)
    return from_bits(lax.fori_loop(0, filled, one_group, zeros_RN), out.dtype)


def filled_groups(R: int, group_sizes_G: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """First and end row of each group, the non-empty groups in order (then any), and how many those are."""
    G = group_sizes_G.shape[0]
    end_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32)
    start_G, end_G = jnp.minimum(end_G - group_sizes_G, R), jnp.minimum(end_G, R)
    group_G = jnp.sort(jnp.where(group_sizes_G > 0, jnp.arange(G, dtype=jnp.int32), G - 1))
    return start_G, end_G, group_G, jnp.sum(group_sizes_G > 0, dtype=jnp.int32)


def owned_only(y_RN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """The same rows, with zeros in those that no group owns, whatever is there."""
    owned = jnp.sum(group_sizes_G, dtype=jnp.int32)
    return jnp.where((jnp.arange(len(y_RN), dtype=jnp.int32) < owned)[:, None], y_RN, 0)


def take_rows(x_TK: Any, index_R: jax.Array | None) -> Any:
    """The rows that an index names, of an array or of each of a pytree; without one, as they are."""
    return x_TK if index_R is None else jax.tree.map(lambda array: array[index_R], x_TK)


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes, inside `shard_map`, over which a function of these arrays varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def mark_varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """Type an array as varying over these axes too: `shard_map` wants a loop's carry to have one type from start to end."""
    axes -= varying_axes(array)
    return lax.pcast(array, tuple(axes), to="varying") if axes else array


def tied(stack: jax.Array, index: Any) -> jax.Array:
    """`stack`, for XLA another one in each trip of the loop that `index` changes in.

    A conversion has to wait for the slice then, and enters its fusion.
    """
    return lax.optimization_barrier((stack, index))[0]


def take_group(stack: jax.Array, group: jax.Array) -> jax.Array:
    """One group's part of a stack, inside a loop over groups."""
    return lax.dynamic_index_in_dim(tied(stack, group), group, keepdims=False)


def to_bits(array: jax.Array) -> jax.Array:
    """Turn a bfloat16 array into what a loop carries in its place: integers, which are never converted."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def from_bits(array: jax.Array, dtype: Any) -> jax.Array:
    """The array of `dtype` behind `to_bits`."""
    return lax.bitcast_convert_type(array, dtype) if array.dtype != dtype else array
