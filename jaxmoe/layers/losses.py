"""Auxiliary losses of a router, from sums over tokens that devices can add up."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class RouterSums(NamedTuple):
    """Sums over some tokens, of which the losses are made; those over all devices are their elementwise sum.

    Attributes:
        expert_counts: int32 [E], number of (token, choice) pairs that went to each expert.
        probabilities: [E] in the logits' dtype, Σ_t softmax(logits_t).
        squared_log_z: scalar of that dtype, Σ_t logsumexp(logits_t)².
        tokens: int32, number of tokens.
    """

    expert_counts: jax.Array
    probabilities: jax.Array
    squared_log_z: jax.Array
    tokens: jax.Array


def router_sums(logits_TE: jax.Array, ids_TK: jax.Array, mask_T: jax.Array) -> RouterSums:
    """Add up over the tokens where `mask_T` is True.

    Args:
        logits_TE: logits of the router.
        ids_TK: int32, experts chosen.
        mask_T: bool, False for padding.
    """
    E = logits_TE.shape[1]
    # Before the sums, not after: the gradient of a row that is left out would be zero times what the row holds.
    logits_TE = jnp.where(mask_T[:, None], logits_TE, 0)
    pairs_TK = jnp.where(mask_T[:, None], ids_TK, E)
    log_z_T = jax.nn.logsumexp(logits_TE, axis=-1)
    return RouterSums(
        expert_counts=jnp.bincount(pairs_TK.reshape(-1), length=E).astype(jnp.int32),
        probabilities=jnp.sum(jnp.where(mask_T[:, None], jax.nn.softmax(logits_TE, axis=-1), 0), axis=0),
        squared_log_z=jnp.sum(jnp.where(mask_T, jnp.square(log_z_T), 0)),
        tokens=jnp.sum(mask_T, dtype=jnp.int32),
    )


def load_balancing_loss(sums: RouterSums) -> jax.Array:
    """E · Σ_e f_e · P_e with f_e choices of expert e per token and P_e its mean probability; K where routing is even.

    It is the loss of one layer's router. The gradient goes through P alone, for f counts. A mean over layers is the Switch
    Transformer's loss (arXiv:2101.03961, equation 4) with K choices instead of one; Mixtral's in transformers takes f
    and P over all layers' tokens at once, which for one layer is the same.
    """
    tokens = jnp.maximum(sums.tokens, 1).astype(sums.probabilities.dtype)
    E = sums.expert_counts.shape[0]
    counts = sums.expert_counts.astype(sums.probabilities.dtype)
    return E * jnp.sum(counts / tokens * (sums.probabilities / tokens))


def router_z_loss(sums: RouterSums) -> jax.Array:
    """Mean over tokens of logsumexp(logits)², which keeps logits small (ST-MoE, arXiv:2202.08906, equation 5)."""
    return sums.squared_log_z / jnp.maximum(sums.tokens, 1).astype(sums.squared_log_z.dtype)
