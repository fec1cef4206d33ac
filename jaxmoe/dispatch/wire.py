"""Tokens as they travel: rows in eight bits, and the choices of a token beside them.

Eight bits are half the bytes of bfloat16, at a relative error of 2⁻⁴ a number. Each row is divided by a scale of its own, so
that its largest number is the largest that the format holds, and rounded (as DeepSeek-V3 sends tokens to experts,
arXiv:2412.19437, section 3.3.3, there a scale for every 128 numbers). The sums that come back from experts keep the
activations' dtype.
"""

import jax
import jax.numpy as jnp

WIRE_DTYPES = ("float8_e4m3fn",)


def check_wire_dtype(wire_dtype: str | None) -> None:
    """Refuse what rows cannot travel in.

    Raises:
        ValueError: neither None nor in `WIRE_DTYPES`.
    """
    if wire_dtype is not None and wire_dtype not in WIRE_DTYPES:
        raise ValueError(
            f"rows travel to experts as {', '.join(WIRE_DTYPES)}, or in the activations' own dtype with None; "
            f"got wire_dtype={wire_dtype!r}"
        )


def pack_rows(x_TD: jax.Array, wire_dtype: str) -> tuple[jax.Array, jax.Array]:
    """Round rows to `wire_dtype`.

    Returns:
        uint8 [T, D], the bits (every collective on every platform carries bytes), and float32 [T, 1], the scales.
    """
    dtype = jnp.dtype(wire_dtype)
    largest_T1 = jnp.max(jnp.abs(x_TD.astype(jnp.float32)), axis=1, keepdims=True)
    # Never 0, not even for a row so small that the quotient is: no device of today divides by a subnormal number.
    scale_T1 = jnp.maximum(largest_T1 / float(jnp.finfo(dtype).max), jnp.finfo(jnp.float32).tiny)
    return jax.lax.bitcast_convert_type((x_TD.astype(jnp.float32) / scale_T1).astype(dtype), jnp.uint8), scale_T1


def unpack_rows(bits_TD: jax.Array, scale_T1: jax.Array, wire_dtype: str, dtype: jnp.dtype) -> jax.Array:
    """Undo `pack_rows`, but for the rounding: rows in `dtype`."""
    rows_TD = jax.lax.bitcast_convert_type(bits_TD, jnp.dtype(wire_dtype)).astype(scale_T1.dtype)
    return (rows_TD * scale_T1).astype(dtype)


def pack_choices(slots_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
    """Put slots and weights into one array, so that one collective carries both.

    The array is [T, 2K] in the weights' dtype: slots plus one, so that zeros mean no expert, then weights. A slot is exact
    as float32 up to 2²⁴, and the weights stay differentiable.
    """
    return jnp.concatenate([(slots_TK + 1).astype(weights_TK.dtype), weights_TK], axis=1)


def unpack_choices(choices_T2K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undo `pack_choices`: int32 slots and the weights, both [T, K]."""
    slots_TK, weights_TK = jnp.split(choices_T2K, 2, axis=1)
    return slots_TK.astype(jnp.int32) - 1, weights_TK
