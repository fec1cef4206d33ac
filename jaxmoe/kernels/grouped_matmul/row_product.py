"""One row times one matrix of a stack: the time is that of reading the matrix, so nothing of it is copied or decoded twice.

XLA copies a slice of a stack before it enters a dot, but not before it enters an elementwise loop. The product is
therefore written as `lanes` interleaved sums, out[n] = Σ_l (Σ_j w[n, j·lanes + l] · x[j·lanes + l]), with the inner sum over
j written out as additions of slices: they become one loop over [N, lanes] that reads each matrix once, in order, a vector
register at a time. A reduction over j would neither fuse nor vectorize.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K], m rows, L lanes,
B bytes, j numbers of a byte.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from math import gcd
from operator import add

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.grouped_matmul.quantized import (
    FORMATS,
    Matrices,
    QuantizedStack,
    bytes_of,
    decode_scales,
    decode_zeros,
    dequantize,
    matrix_of,
    split_bytes,
)
from jaxmoe.kernels.grouped_matmul.row_loops import take_group, tied
from jaxmoe.numerics import int32, sum_dtype

# float32 numbers in the widest vector register of current CPUs, and the narrowest worth using.
LANES, MIN_LANES = 16, 8
# Slices added up in one fusion: 2 kB of a float32 row, long enough for the prefetcher, short enough to compile fast.
BLOCK = 32

# From the first of some consecutive slices and their number, to the product [N, lanes] of each with its part of x.
Terms = Callable[[int | jax.Array, int], Iterable[jax.Array]]


def row_product(x_1K: jax.Array, stack: Matrices, group: jax.Array) -> jax.Array:
    """stack[group] @ x for one row, in the dtype of sums."""
    if isinstance(stack, QuantizedStack):
        # Lanes do not cross from one scale to the next, nor does a byte.
        bytes_a_scale, split = divmod(stack.block[1], FORMATS[stack.format].per_byte)
        lanes = gcd(bytes_a_scale, LANES)
        if lanes >= MIN_LANES and not split:
            return _packed_lane_product(x_1K[0], stack, group, lanes)[None]
        return matmul(x_1K, dequantize(matrix_of(stack, group)))
    lanes = gcd(stack.shape[2], LANES)
    if lanes >= MIN_LANES:
        return _lane_product(x_1K[0], stack, group, lanes)[None]
    return matmul(x_1K, take_group(stack, group))


def matmul(x_mK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """x @ wᵀ in the dtype of sums; the rows are widened where the matrix is wider."""
    return jnp.matmul(x_mK.astype(w_NK.dtype), w_NK.T, preferred_element_type=sum_dtype(w_NK.dtype))


def matrix_first(x_mK: jax.Array, w_NK: jax.Array) -> jax.Array:
    """The same as (w @ xᵀ)ᵀ: XLA for CPU packs the second operand of each product anew, and x is the smaller one.

    The barrier keeps it from turning the product around again.
    """
    x_Km, dtype = x_mK.astype(w_NK.dtype).T, sum_dtype(w_NK.dtype)
    return lax.optimization_barrier(jnp.matmul(w_NK, x_Km, preferred_element_type=dtype)).T


def _lane_product(x_K: jax.Array, w_GNK: jax.Array, group: jax.Array, lanes: int) -> jax.Array:
    (N, K), dtype = w_GNK.shape[1:], sum_dtype(w_GNK.dtype)
    # Without the barrier XLA would recompute x for every n.
    x_1K = lax.optimization_barrier(x_K.astype(dtype))[None]

    def terms(first: int | jax.Array, count: int) -> Iterable[jax.Array]:
        for j in range(count):
            k = (first + j) * lanes
            stack = tied(w_GNK, (group, jnp.int32(k)))
            w_NL = lax.dynamic_slice(stack, int32(group, 0, k), (1, N, lanes))[0].astype(dtype)
            yield w_NL * lax.dynamic_slice_in_dim(x_1K, k, lanes, axis=1)

    return _sum_lanes(terms, K // lanes)


def _packed_lane_product(x_K: jax.Array, stack: QuantizedStack, group: jax.Array, lanes: int) -> jax.Array:
    """The same over lanes of bytes. Where a byte has two numbers, x is taken apart into its even and its odd places."""
    form = FORMATS[stack.format]
    N, width, (bn, bk) = stack.shape[1], stack.values.shape[2], stack.block
    bytes_a_scale = bk // form.per_byte
    x_jB = lax.optimization_barrier(x_K.astype(jnp.float32).reshape(width, form.per_byte).T)
    matrix = matrix_of(stack, group)
    scales_NB, zeros_NB = lax.optimization_barrier(
        jax.tree.map(lambda blocks: jnp.repeat(blocks, bn, axis=0), (decode_scales(matrix), decode_zeros(matrix)))
    )

    def terms(first: int | jax.Array, count: int) -> Iterable[jax.Array]:
        bytes_NB = lax.optimization_barrier(bytes_of(stack, group, first * lanes, count * lanes))
        for j in range(count):
            start = (first + j) * lanes
            of_block = int32(0, start // bytes_a_scale), (N, 1)
            product_NL: jax.Array | float = 0.0
            for number, codes_NL in enumerate(split_bytes(stack.format, bytes_NB[:, j * lanes : (j + 1) * lanes])):
                w_NL = form.decode(codes_NL)
                if zeros_NB is not None:
                    w_NL = w_NL - lax.dynamic_slice(zeros_NB, *of_block)
                product_NL = product_NL + w_NL * lax.dynamic_slice(x_jB, int32(number, start), (1, lanes))
            yield product_NL * lax.dynamic_slice(scales_NB, *of_block)

    return _sum_lanes(terms, width // lanes)


def _sum_lanes(terms: Terms, slices: int) -> jax.Array:
    """Σ over lanes of Σ over slices of `terms`, [N]."""
    blocks, rest = divmod(slices, BLOCK)
    if blocks < 3:  # of two, the loop would have one trip, which XLA inlines; then nothing ties the stack to it
        sum_NL = reduce(add, terms(0, slices))
    else:
        sum_NL = reduce(add, terms(0, BLOCK))  # not zeros: inside `shard_map` the carry has to vary from the start
        sum_NL = lax.fori_loop(1, blocks, lambda b, sum_NL: reduce(add, terms(b * BLOCK, BLOCK), sum_NL), sum_NL)
        sum_NL = reduce(add, terms(blocks * BLOCK, rest), sum_NL)
    # As a dot, which XLA hands to a vectorized routine; HIGHEST, for it only adds up what is rounded already. The barrier
    # keeps this sum out of the first loop.
    ones_L = jnp.ones(sum_NL.shape[1], sum_NL.dtype)
    return jnp.matmul(lax.optimization_barrier(sum_NL), ones_L, precision=lax.Precision.HIGHEST)
