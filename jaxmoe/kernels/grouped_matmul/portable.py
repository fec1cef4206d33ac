"""The backend for every platform: plain XLA, loops over the rows that are filled.

Two products, chosen by the static number of rows a group:

* many rows: slice the group's matrix out of the stack, once, and multiply it with tiles of rows; the copy that XLA
  makes of the slice is small beside the products;
* few rows: the time is that of reading the matrices, which `row_product` does in place.

Packed matrices are decoded to float32 in the same places, those of one group at a time. A single one with all of the rows is
decoded as `one_matrix` says, except on CPUs.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K], m rows of a
tile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.grouped_matmul.combine import Combine
from jaxmoe.kernels.grouped_matmul.gradient import group_gradients, with_gradient_of
from jaxmoe.kernels.grouped_matmul.one_matrix import is_one_matrix, multiply_in_parts
from jaxmoe.kernels.grouped_matmul.quantized import Matrices, QuantizedStack, dequantize, matrix_of
from jaxmoe.kernels.grouped_matmul.row_loops import (
    map_rows,
    map_tiles,
    mark_varying,
    rows_per_tile,
    take_group,
    varying_axes,
)
from jaxmoe.kernels.grouped_matmul.row_product import matmul, matrix_first, row_product
from jaxmoe.numerics import sum_dtype


def grouped_matmul(
    lhs_RK: jax.Array,
    rhs_GNK: Matrices,
    group_sizes_G: jax.Array,
    *,
    out_dtype: jnp.dtype,
    device_kind: str | None = None,
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r], as `Kernels` says; the same on all kinds of devices."""
    out = jax.ShapeDtypeStruct((lhs_RK.shape[0], rhs_GNK.shape[1]), out_dtype)

    def by_groups(arrays: Any, group_sizes_G: jax.Array) -> jax.Array:
        lhs_RK, rhs_GNK = arrays
        return _map_groups(lambda x_mK, affine: affine(0, x_mK), lhs_RK, [(rhs_GNK, None)], group_sizes_G, out)

    def in_parts(arrays: Any, group_sizes_G: jax.Array) -> jax.Array:
        lhs_RK, rhs_GNK = arrays
        return multiply_in_parts(lhs_RK, rhs_GNK, group_sizes_G, out_dtype)

    arrays = lhs_RK, rhs_GNK
    if isinstance(rhs_GNK, QuantizedStack) and is_one_matrix(rhs_GNK) and 0 not in (*lhs_RK.shape, *rhs_GNK.shape):
        on_gpus = partial(with_gradient_of, by_groups, in_parts)
        return lax.platform_dependent(arrays, group_sizes_G, cpu=by_groups, default=on_gpus)
    return by_groups(arrays, group_sizes_G)


def expert_mlp(
    x_RD: jax.Array,
    w_up_pND: Matrices,
    w_down_pDF: Matrices,
    group_sizes_p: jax.Array,
    *,
    b_up_pN: jax.Array | None,
    b_down_pD: jax.Array | None,
    combine: Combine,
    out_dtype: jnp.dtype,
    device_kind: str | None = None,
) -> jax.Array:
    """y = W_down[g] @ combine(W_up[g] @ x + b_up[g]) + b_down[g]; see `Kernels.expert_mlp`.

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
# Stacks of matrices [G, N, K] and, if any, of biases [G, N].
Maps = list[tuple[Matrices, jax.Array | None]]
# The same of one group, decoded.
GroupMaps = list[tuple[jax.Array, jax.Array | None]]
# From rows [m, K] and a matrix [N, K] to rows [m, N], in float32.
Product = Callable[[jax.Array, jax.Array], jax.Array]


def _map_groups(
    fn: RowsFn, x_RK: jax.Array, maps: Maps, group_sizes_G: jax.Array, out: jax.ShapeDtypeStruct
) -> jax.Array:
    """Apply `fn(rows, affine)` to the rows of every group; differentiable in `x_RK` and what is not packed of `maps`."""
    stacks = jax.tree.leaves(maps)
    if 0 in x_RK.shape or any(0 in stack.shape for stack in stacks):
        return jnp.zeros(out.shape, out.dtype)
    varying = varying_axes(x_RK, *stacks, group_sizes_G)
    # All of one type inside `shard_map`, as a custom rule needs it; the transpose of this sums gradients over the mesh.
    x_RK, maps = jax.tree.map(lambda array: mark_varying(array, varying), (x_RK, maps))
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
    if rows_per_tile(x_RK.shape[0], group_sizes_G.shape[0]) == 1:

        def row_fn(group: jax.Array, x_1K: jax.Array) -> jax.Array:
            def affine(index: int, y_1K: jax.Array) -> jax.Array:
                matrices, biases = maps[index]
                return _add_bias(row_product(y_1K, matrices, group), _group_of(biases, group))

            return fn(x_1K, affine)

        return map_rows(row_fn, x_RK, group_sizes_G, out, varying=varying)

    def in_tiles(decode: Callable[[Any, jax.Array], Any], product: Product, *inputs: Any) -> jax.Array:
        x_RK, maps, group_sizes_G = inputs
        return map_tiles(partial(decode, maps), partial(_tile, fn, product), x_RK, group_sizes_G, out, varying=varying)

    # XLA for CPU multiplies bfloat16 at a fraction of float32's speed: there a group's matrix is converted, once.
    cpu, default = partial(in_tiles, _wide_group_of, matrix_first), partial(in_tiles, _group_of, matmul)
    return lax.platform_dependent(x_RK, maps, group_sizes_G, cpu=cpu, default=default)


def _forward(
    fn: RowsFn, out: jax.ShapeDtypeStruct, varying: frozenset[str], *inputs: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    return _map_groups_vjp(fn, out, varying, *inputs), inputs


def _backward(
    fn: RowsFn, out: jax.ShapeDtypeStruct, varying: frozenset[str], inputs: tuple[Any, ...], dy_RN: jax.Array
) -> tuple[jax.Array, Any, None]:
    x_RK, maps, group_sizes_G = inputs
    packed = jax.tree.map(lambda stack: stack if _is_packed(stack) else None, maps, is_leaf=_is_packed)
    trained = jax.tree.map(lambda stack: None if _is_packed(stack) else stack, maps, is_leaf=_is_packed)

    def tile_fn(decoded: Any, own: Any, x_mK: jax.Array) -> jax.Array:
        both = jax.tree.map(lambda d, o: o if d is None else d, decoded, own, is_leaf=lambda leaf: leaf is None)
        return _tile(fn, matmul, both, x_mK)

    dmaps, dx_RK = group_gradients(
        partial(_group_of, packed), tile_fn, trained, x_RK, group_sizes_G, dy_RN, varying=varying
    )
    return dx_RK, dmaps, None


_map_groups_vjp.defvjp(_forward, _backward)


def _is_packed(stack: Any) -> bool:
    return isinstance(stack, QuantizedStack)


def _group_of(stacks: Any, group: jax.Array) -> Any:
    """One group's part of each stack, decoded."""

    def take(stack: Matrices) -> jax.Array:
        if isinstance(stack, QuantizedStack):
            return dequantize(matrix_of(stack, group))
        return take_group(stack, group)

    return jax.tree.map(take, stacks, is_leaf=_is_packed)


def _wide_group_of(stacks: Any, group: jax.Array) -> Any:
    return jax.tree.map(lambda part: part.astype(sum_dtype(part.dtype)), _group_of(stacks, group))


def _tile(fn: RowsFn, product: Product, maps: GroupMaps, x_mK: jax.Array) -> jax.Array:
    """`fn` of a tile of rows of one group."""

    def affine(index: int, y_mK: jax.Array) -> jax.Array:
        matrix_NK, bias_N = maps[index]
        return _add_bias(product(y_mK, matrix_NK), bias_N)

    return fn(x_mK, affine)


def _add_bias(y_mN: jax.Array, bias_N: jax.Array | None) -> jax.Array:
    return y_mN if bias_N is None else y_mN + bias_N.astype(y_mN.dtype)[None]
