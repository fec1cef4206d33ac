"""The backend for every platform: plain XLA, loops over the rows that are filled.

Two products, chosen by the static number of rows a group:

* many rows: slice the group's matrix out of the stack, once, and multiply it with tiles of rows; the copy that XLA
  makes of the slice is small beside the products;
* few rows: the time is that of reading the matrices, so `_lane_product` is written for XLA to fuse the slice and to
  vectorise the sum, and nothing is copied.
"""

from collections.abc import Callable
from math import gcd

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.grouped_matmul.activations import Activation
from jaxmoe.kernels.grouped_matmul.tiles import map_rows, map_tiles, rows_per_tile, varying_axes

# float32 numbers in the widest vector register of current CPUs, and the narrowest worth using.
LANES, MIN_LANES = 16, 8
# Slices added up in one fusion: 2 kB of a float32 row, long enough for the prefetcher, short enough to compile fast.
BLOCK = 32


# From the index of a stack and rows [m, K] to their product [m, N] with the group's matrix, in float32.
Product = Callable[[int, jax.Array], jax.Array]


def grouped_matmul(
    lhs_RK: jax.Array, rhs_GNK: jax.Array, group_sizes_G: jax.Array, *, out_dtype: jnp.dtype
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r]; see `api.grouped_matmul`."""
    out = jax.ShapeDtypeStruct((lhs_RK.shape[0], rhs_GNK.shape[1]), out_dtype)
    return _map_groups(lambda x_mK, product: product(0, x_mK), lhs_RK, (rhs_GNK,), group_sizes_G, out)


def expert_mlp(
    x_RD: jax.Array,
    w_gate_up_p2FD: jax.Array,
    w_down_pDF: jax.Array,
    group_sizes_p: jax.Array,
    *,
    activation: Activation,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """y = W_down[g] @ (act(W_gate[g] @ x) * (W_up[g] @ x)); see `api.expert_mlp`.

    Both products of a tile happen in one trip, so that h stays in cache and is never stored for all rows.
    """
    p, _, F, D = w_gate_up_p2FD.shape

    def mlp(x_mD: jax.Array, product: Product) -> jax.Array:
        gate_up_mN = product(0, x_mD)
        h_mF = activation(gate_up_mN[:, :F]) * gate_up_mN[:, F:]
        return product(1, h_mF.astype(x_mD.dtype))

    stacks = (w_gate_up_p2FD.reshape(p, 2 * F, D), w_down_pDF)
    return _map_groups(mlp, x_RD, stacks, group_sizes_p, jax.ShapeDtypeStruct(x_RD.shape, out_dtype))


def _map_groups(
    fn: Callable[[jax.Array, Product], jax.Array],
    x_RK: jax.Array,
    stacks: tuple[jax.Array, ...],
    group_sizes_G: jax.Array,
    out: jax.ShapeDtypeStruct,
) -> jax.Array:
    """Apply `fn(rows, product)` to the rows of every group, `product` being with the group's matrices."""
    if 0 in x_RK.shape or any(0 in stack.shape for stack in stacks):
        return jnp.zeros(out.shape, out.dtype)
    varying = varying_axes(x_RK, *stacks, group_sizes_G)

    if rows_per_tile(x_RK.shape[0], group_sizes_G.shape[0]) == 1:

        def row_fn(group: jax.Array, x_1K: jax.Array) -> jax.Array:
            return fn(x_1K, lambda index, y_1K: _row_product(y_1K, stacks[index], group))

        return map_rows(row_fn, x_RK, group_sizes_G, out, varying=varying)

    def load(group: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(lax.dynamic_index_in_dim(stack, group, keepdims=False) for stack in stacks)

    def tile_fn(matrices: tuple[jax.Array, ...], x_mK: jax.Array) -> jax.Array:
        return fn(x_mK, lambda index, y_mK: _matmul(y_mK, matrices[index]))

    return map_tiles(load, tile_fn, x_RK, group_sizes_G, out, varying=varying)


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
