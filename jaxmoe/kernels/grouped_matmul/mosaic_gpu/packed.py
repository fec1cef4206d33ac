"""Packed matrices as the kernel expands them: exactly, in registers, to bfloat16.

A byte of 4-bit numbers is not taken apart into neighboring columns, which would move numbers between threads: its low
halves make one matrix, of the even inputs, and its high halves another, of the odd ones. Rows are split in the same way
before the kernel, and the two products are added up.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# From the bytes [n, bytes] of a tile to the parts that they hold, bfloat16 of the same shape.
Expand = Callable[[jax.Array], tuple[jax.Array, ...]]


def _number(byte: jax.Array) -> jax.Array:
    """A signed byte as bfloat16, exact: there are instructions for it, while shifts and sums want wider numbers."""
    return byte.astype(jnp.int8).astype(jnp.bfloat16)


def _expand_float8(values: jax.Array) -> tuple[jax.Array, ...]:
    return (values.astype(jnp.float32).astype(jnp.bfloat16),)


def _expand_int8(values: jax.Array) -> tuple[jax.Array, ...]:
    return (_number(values),)


def _expand_int4(values: jax.Array) -> tuple[jax.Array, ...]:
    """code - 8. With its first bit turned over, the high half is that in two's complement, sixteenfold."""
    return _number(values & 0x0F) - 8, _number((values ^ 0x80) & 0xF0) * (1 / 16)


def _expand_float4(values: jax.Array) -> tuple[jax.Array, ...]:
    """e2m1: the codes 0 to 7 stand for 0, 1, 2, 3, 4, 6, 8, 12 halves, which is c + max(c - 4, 0) + 2 max(c - 6, 0)."""

    def signed(code: jax.Array, half: jax.Array) -> jax.Array:
        return (code + jnp.maximum(code - 4, 0) + 2 * jnp.maximum(code - 6, 0)) * half

    low = signed(_number(values & 0x07), 0.5 - _number(values & 0x08) * (1 / 8))
    high = signed(_number(values & 0x70) * (1 / 16), 0.5 + _number(values & 0x80) * (1 / 128))
    return low, high


EXPAND: dict[str, Expand] = {
    "float8_e4m3fn": _expand_float8,
    "int4": _expand_int4,
    "int8": _expand_int8,
    "mxfp4": _expand_float4,
    "nvfp4": _expand_float4,
}


def scale_number(scale: jax.Array) -> jax.Array:
    """A scale as float32: as it is, or 2^(s - 127) of a byte s, and NaN of 255."""
    if scale.dtype != jnp.uint8:
        return scale.astype(jnp.float32)
    exponent = scale.astype(jnp.int32).astype(jnp.float32)
    return jnp.where(exponent == 255, jnp.nan, jnp.exp2(exponent - 127))


def zero_number(zero: jax.Array) -> jax.Array:
    """The number still to be subtracted from an expanded code of int4 where `zero` stands for zero; bfloat16, exact."""
    return zero.astype(jnp.int32).astype(jnp.float32).astype(jnp.bfloat16) - 8
