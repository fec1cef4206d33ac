"""The backend for every platform: plain XLA, loops over the rows that are filled.

Two products, chosen by the static number of rows a group:

* many rows: slice the group's matrix out of the stack, once, and multiply it with tiles of rows; the copy that XLA
  makes of the slice is small beside the products;
* few rows: the time is that of reading the matrices, so `_lane_product` is written for XLA to fuse the slice and to
  vectorise the sum, and nothing is copied.
"""

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.grouped_matmul.activations import Combine
from jaxmoe.kernels.grouped_matmul.gradient import group_gradients
from jaxmoe.kernels.grouped_matmul.tiles import map_rows, map_tiles, mark_varying, rows_per_tile, varying_axes

# float32 numbers in the widest vector register of current CPUs, and the narrowest worth using.
LANES, MIN_LANES = 16, 8
# Slices added up in one fusion: 2 kB of a float32 row, long enough for the prefetcher, short enough to compile fast.
BLOCK = 32


def grouped_matmul(
    lhs_RK: jax.Array, rhs_GNK: jax.Array, group_sizes_G: jax.Array, *, out_dtype: jnp.dtype
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r]; see `api.grouped_matmul`."""
    out = jax.ShapeDtypeStruct((lhs_RK.shape[0], rhs_GNK.shape[1]), out_dtype)
    return _map_groups(lambda x_mK, affine: affine(0, x_mK), lhs_RK, [(rhs_GNK, None)], group_sizes_G, out)


def expert_mlp(
    x_RD: jax.Array,
    w_up_pND: jax.Array,
    w_down_pDF: jax.Array,
    group_sizes_p: jax.Array,
    *,
    b_up_pN: jax.Array | None,
    b_down_pD: jax.Array | None,
    combine: Combine,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """y = W_down[g] @ combine(W_up[g] @ x + b_up[g]) + b_down[g]; see `api.expert_mlp`.

    Both products of a tile happen in one trip, so that h stays in cache and is never stored for all rows.
    """

    def mlp(x_mD: jax.Array, affine: Affine) -> jax.Array:
        h_mF = combine(affine(0, x_mD)).astype(x_mD.dtype)
        return affine(1, h_mF)

    maps = [(w_up_pND, b_up_pN), (w_down_pDF, b_down_pD)]
    return _map_groups(mlp, x_RD, maps, group_sizes_p, jax.ShapeDtypeStruct(x_RD.shape, out_dtype))


# From the index of one of a group's affine maps and rows [m, K] to W x + b [m, N], in float32.
Affine = Callable[[int, jax.Array], jax.Array]
# What is applied to the rows of a group: rows [m, K] and the group's affine maps to rows [m, N].
RowsFn = Callable[[jax.Array, Affine], jax.Array]
# Stacks of matrices [G, N, K] and, if any, of biases [G, N]; or one group's part of them.
Maps = list[tuple[jax.Array, jax.Array | None]]


def _map_groups(
    fn: RowsFn, x_RK: jax.Array, maps: Maps, group_sizes_G: jax.Array, out: jax.ShapeDtypeStruct
) -> jax.Array:
    """Apply `fn(rows, affine)` to the rows of every group; differentiable in `x_RK` and `maps`."""
    stacks = jax.tree.leaves(maps)
    if 0 in x_RK.shape or any(0 in stack.shape for stack in stacks):
        return jnp.zeros(out.shape, out.dtype)
    varying = varying_axes(x_RK, *stacks, group_sizes_G)
    # All of one type inside `shard_map`, as a custom rule needs it; the transpose of this sums gradients over the mesh.
    x_RK, maps = jax.tree.map(lambda array: mark_varying(array, varying - varying_axes(array)), (x_RK, maps))
    return _map_groups_vjp(fn, out, varying, x_RK, maps, group_sizes_G)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _map_groups_vjp(
    fn: RowsFn,
    out: jax.ShapeDtypeStruct,
    varying: frozenset[str],
    x_RK: jax.Array,
    maps: Maps,
    group_sizes_G: jax.Array,
) -> jax.Array:
    def slice_of(stack: jax.Array, group: jax.Array) -> jax.Array:
        return lax.dynamic_index_in_dim(stack, group, keepdims=False)

    if rows_per_tile(x_RK.shape[0], group_sizes_G.shape[0]) == 1:

        def row_fn(group: jax.Array, x_1K: jax.Array) -> jax.Array:
            def affine(index: int, y_1K: jax.Array) -> jax.Array:
                matrices, biases = maps[index]
                bias_N = None if biases is None else slice_of(biases, group)
                return _add_bias(_row_product(y_1K, matrices, group), bias_N)

            return fn(x_1K, affine)

        return map_rows(row_fn, x_RK, group_sizes_G, out, varying=varying)

    def load(group: jax.Array) -> Maps:
        return jax.tree.map(lambda stack: slice_of(stack, group), maps)

    return map_tiles(load, partial(_tile, fn), x_RK, group_sizes_G, out, varying=varying)


def _forward(
    fn: RowsFn, out: jax.ShapeDtypeStruct, varying: frozenset[str], *inputs: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _map_groups_vjp(fn, out, varying, *inputs), inputs


def _backward(
    fn: RowsFn, out: jax.ShapeDtypeStruct, varying: frozenset[str], inputs: tuple[Any, ...], dy_RN: jax.Array
) -> tuple[jax.Array, Maps, None]:
    x_RK, maps, group_sizes_G = inputs
    dmaps, dx_RK = group_gradients(partial(_tile, fn), maps, x_RK, group_sizes_G, dy_RN, varying=varying)
    return dx_RK, dmaps, None


_map_groups_vjp.defvjp(_forward, _backward)


def _tile(fn: RowsFn, maps: Maps, x_mK: jax.Array) -> jax.Array:
    """`fn` of a tile of rows; `maps` are one group's."""

    def affine(index: int, y_mK: jax.Array) -> jax.Array:
        matrix_NK, bias_N = maps[index]
        return _add_bias(_matmul(y_mK, matrix_NK), bias_N)

    return fn(x_mK, affine)


def _add_bias(y_mN: jax.Array, bias_N: jax.Array | None) -> jax.Array:
    return y_mN if bias_N is None else y_mN + bias_N.astype(jnp.float32)


def _row_product(x_1K: jax.Array, w_GNK: jax.Array, group: jax.Array) -> jax.Array:
    """w[group] @ x for one row, in float32."""
    lanes = gcd(w_GNK.shape[2], LANES)
    if lanes >= MIN_LANES:
        return _lane_product(x_1K[0], w_GNK, group, lanes)[None]
    return _matmul(x_1K, lax.dynamic_index_in_dim(w_GNK, group, keepdims=False))


def _matmul(x_mK: jax.Array, w_NK: jax.Array) -> jax.Array:
    return jnp.matmul(x_mK, w_NK.T, preferred_element_type=jnp.float32)


def _lane_product(x_K: jax.Array, w_GNK: jax.Array, group: jax.Array, lanes: int) -> jax.Array:
    """w[group] @ x as `lanes` interleaved sums: out[n] = Σ_l (Σ_j w[group, n, j·lanes + l] · x[j·lanes + l]).

    XLA copies a slice of a stack before it enters a dot, but not before it enters an elementwise loop. The inner sum
    over j is therefore written out as additions of static slices, which become one loop over [N, lanes] that reads
    each matrix once, in order, a vector register at a time. A reduction over j would neither fuse nor vectorise.
    """
    N, K = w_GNK.shape[1:]
    # Without the barriers XLA would recompute x for every n, and sink the second sum into the first loop.
    x_K = lax.optimization_barrier(x_K.astype(jnp.float32))

    def add_slices(first: int | jax.Array, count: int, sum_NL: jax.Array | float = 0.0) -> jax.Array:
        for j in range(count):
            k = first + j * lanes
            w_NL = lax.dynamic_slice(w_GNK, (group, 0, k), (1, N, lanes))[0].astype(jnp.float32)
            sum_NL = sum_NL + w_NL * lax.dynamic_slice_in_dim(x_K, k, lanes)
        return jnp.asarray(sum_NL)

    blocks, rest = divmod(K // lanes, BLOCK)
    if blocks < 2:
        sum_NL = add_slices(0, K // lanes)
    else:
        width = BLOCK * lanes
        sum_NL = add_slices(0, BLOCK)  # not zeros: inside `shard_map` the carry has to vary from the start
        sum_NL = lax.fori_loop(1, blocks, lambda b, sum_NL: add_slices(b * width, BLOCK, sum_NL), sum_NL)
        sum_NL = add_slices(blocks * width, rest, sum_NL)
    # As a dot, which XLA hands to a vectorised routine; HIGHEST, for it only adds up what is float32 already.
    ones_L = jnp.ones(lanes, jnp.float32)
    return jnp.matmul(lax.optimization_barrier(sum_NL), ones_L, precision=lax.Precision.HIGHEST)
