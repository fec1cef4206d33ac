"""The choices of a token as they travel with it: slots and weights in one array, so that one collective carries both."""

import jax
import jax.numpy as jnp


def pack_choices(slots_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
    """[T, 2K] in the weights' dtype: slots plus one, so that zeros mean no expert, and weights.

    A slot is exact as float32 up to 2²⁴, and the weights stay differentiable.
    """
    return jnp.concatenate([(slots_TK + 1).astype(weights_TK.dtype), weights_TK], axis=1)


def unpack_choices(choices_T2K: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undo `pack_choices`: int32 slots and the weights, both [T, K]."""
    slots_TK, weights_TK = jnp.split(choices_T2K, 2, axis=1)
    return slots_TK.astype(jnp.int32) - 1, weights_TK
