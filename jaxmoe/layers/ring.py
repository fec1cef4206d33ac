"""Caches of the last n tokens: the token at position p lies at slot p % n.

Letters here, beside the common ones of docs/concepts/letters.md: n slots, A numbers of a token.
"""

import jax
import jax.numpy as jnp

from jaxmoe.layers.cache import write_token


def ring_positions(last_B: jax.Array, slots: int) -> jax.Array:
    """The position of the token in each slot, int32 [B, n], where `last_B` are the newest ones; below 0 for none."""
    slot_1n = jnp.arange(slots, dtype=jnp.int32)[None]
    return last_B[:, None] - (last_B[:, None] - slot_1n) % slots


def ring_of_prompt(x_BSA: jax.Array, lengths_B: jax.Array, slots: int) -> jax.Array:
    """The last tokens of prompts of these lengths, [B, n, A]; a slot that has none holds anything."""
    at_Bn = jnp.maximum(ring_positions(lengths_B - 1, slots), 0)
    return jnp.take_along_axis(x_BSA, at_Bn[..., None], axis=1)


def write_ring(ring_BnA: jax.Array, new_B1A: jax.Array, position_B: jax.Array) -> jax.Array:
    """Write one token of each row over the one n positions before; returns the ring."""
    return write_token(ring_BnA, new_B1A, position_B % ring_BnA.shape[1])


def ring_slice(ring_BnA: jax.Array, first_B: jax.Array, count: int) -> jax.Array:
    """The tokens at the `count` positions from `first_B` on, [B, count, A], where they are in the ring."""
    at_Bc = (first_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None]) % ring_BnA.shape[1]
    return jnp.take_along_axis(ring_BnA, at_Bc[..., None], axis=1)
