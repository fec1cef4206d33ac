"""Writing part of an array in the memory it already has."""

import jax
import jax.numpy as jnp

from jaxmoe.numerics import int32

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


def update_slice(whole: jax.Array, piece: jax.Array, starts: tuple[jax.Array | int, ...]) -> jax.Array:
    """Write `piece`, of the same dtype, into `whole` at `starts`: in place where `whole` is donated or dead afterwards."""
    dtype, starts = whole.dtype, int32(*starts)
    if not jnp.issubdtype(dtype, jnp.floating):
        return jax.lax.dynamic_update_slice(whole, piece, starts)
    # As integers: XLA's CPU backend would convert all of a bfloat16 `whole` to float32 and back for every piece.
    bits = _BITS[dtype.itemsize]
    whole, piece = (jax.lax.bitcast_convert_type(array, bits) for array in (whole, piece))
    return jax.lax.bitcast_convert_type(jax.lax.dynamic_update_slice(whole, piece, starts), dtype)
