"""Rows times one packed matrix on GPUs, by XLA: the matrix is decoded in parts that stay in the GPU's cache.

XLA writes what it decodes to memory before it enters a dot, and in parts as large as it is told. A loop over parts of the
outputs reads the packed bytes once, and needs room for one part alone.

Letters here, beside the common ones of docs/concepts/letters.md: N and K of a matrix [N, K], n outputs of a part.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.grouped_matmul.quantized import QuantizedStack, dequantize
from jaxmoe.kernels.grouped_matmul.row_loops import mark_varying, varying_axes
from jaxmoe.numerics import sum_dtype, zeros_behind

# Bytes of a decoded part: less than half of the cache of an A100, the smallest of the GPUs of data centers since.
PART_BYTES = 2**24
# Outputs of a tile of a dot: parts are a multiple of it.
_TILE = 128


def outputs_per_part(N: int, K: int, itemsize: int, unit: int) -> int:
    """Outputs that are decoded at once: N, or a multiple of `unit`, those that share a scale."""
    if N * K * itemsize <= PART_BYTES:
        return N
    step = math.lcm(unit, _TILE)
    return min(N, max(PART_BYTES // (K * itemsize) // step, 1) * step)


def is_one_matrix(stack_GNK: QuantizedStack) -> bool:
    """Whether a stack is one matrix, with one of `matrix_scales` at most."""
    factors = stack_GNK.matrix_scales
    return stack_GNK.shape[0] == 1 and (factors is None or factors.shape == (1, 1))


def multiply_in_parts(
    lhs_RK: jax.Array, stack_1NK: QuantizedStack, group_sizes_1: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """lhs @ matrixᵀ with the only matrix of a stack rounded to the rows' dtype, [R, N]; zeros where no group owns the row.

    Args:
        lhs_RK: rows.
        stack_1NK: packed matrix, as `is_one_matrix` wants it.
        group_sizes_1: int32, number of rows that the group owns.
        out_dtype: dtype of the result; sums are as `Kernels` says.
    """
    matrix_NK = jax.tree.map(lambda array: array[0], stack_1NK)
    out_RN = _multiply(lhs_RK, matrix_NK, out_dtype)
    return jnp.where((jnp.arange(len(out_RN), dtype=jnp.int32) < group_sizes_1[0])[:, None], out_RN, 0)


def _multiply(lhs_RK: jax.Array, matrix_NK: QuantizedStack, out_dtype: jnp.dtype) -> jax.Array:
    (N, K), rows = matrix_NK.shape, matrix_NK.scales.shape[0]
    unit = 1 if rows == 1 else N // rows
    n = outputs_per_part(N, K, lhs_RK.dtype.itemsize, unit)

    def product(part_nK: QuantizedStack) -> jax.Array:
        w_nK = dequantize(part_nK, lhs_RK.dtype)
        return jnp.matmul(lhs_RK, w_nK.T, preferred_element_type=sum_dtype(lhs_RK.dtype)).astype(out_dtype)

    if n == N:
        return product(matrix_NK)

    def one_part(i: jax.Array, out_RN: jax.Array) -> jax.Array:
        # The last part of all may not stick out beyond N: it starts earlier instead.
        first = jnp.minimum(i * n, N - n)
        y_Rn = product(_part(matrix_NK, first, n, unit))
        return lax.dynamic_update_slice_in_dim(out_RN, y_Rn, first, 1)

    varying = varying_axes(lhs_RK, *jax.tree.leaves(matrix_NK))
    zeros_RN = mark_varying(zeros_behind(lhs_RK, (lhs_RK.shape[0], N), out_dtype), varying)
    return lax.fori_loop(0, -(-N // n), one_part, zeros_RN)


def _part(matrix_NK: QuantizedStack, first: jax.Array, n: int, unit: int) -> QuantizedStack:
    """The outputs `first` to `first` + n, multiples of `unit` both."""
    shared = matrix_NK.scales.shape[0] == 1

    def of_blocks(array: jax.Array) -> jax.Array:
        return array if shared else lax.dynamic_slice_in_dim(array, first // unit, n // unit)

    return dataclasses.replace(
        matrix_NK,
        values=lax.dynamic_slice_in_dim(matrix_NK.values, first, n),
        scales=of_blocks(matrix_NK.scales),
        zero_points=None if matrix_NK.zero_points is None else of_blocks(matrix_NK.zero_points),
        block=(n if shared else unit, matrix_NK.block[1]),
    )
