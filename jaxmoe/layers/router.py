"""Routers: from activations to experts and weights, as pure functions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmoe.config import RouterConfig

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits_TE: jax.nn.softmax(logits_TE, axis=-1),
    "sigmoid": jax.nn.sigmoid,
}


def route(
    x_TD: jax.Array, w_router_ED: jax.Array, num_experts_per_tok: int, config: RouterConfig
) -> tuple[jax.Array, jax.Array]:
    """Choose K experts for each token and weight them, in float32.

    scores = score(x @ w_routerᵀ); the K largest are chosen, the lowest index first among equals,
    and their scores are the weights, divided by their sum with ``config.renormalize``.
    Shazeer et al. 2017 (arXiv:1701.06538), section 2.1.

    Returns:
        int32 [T, K] logical experts and float32 [T, K] weights, largest first.
    """
    logits_TE = jnp.einsum(
        "td,ed->te",
        x_TD.astype(jnp.float32),
        w_router_ED.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    weights_TK, ids_TK = jax.lax.top_k(SCORES[config.score](logits_TE), num_experts_per_tok)
    if config.renormalize:
        weights_TK /= jnp.sum(weights_TK, axis=-1, keepdims=True)
    return ids_TK, weights_TK
