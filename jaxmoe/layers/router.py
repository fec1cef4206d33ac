"""Routers: from activations to experts and weights, as pure functions.

A score is a function from logits to scores and a line in `SCORES`; `route` composes the rest
from a `RouterConfig`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxmoe.config import RouterConfig, RouterFunction
from jaxmoe.kernels.dtypes import sum_dtype
from jaxmoe.layers.norm import rms_norm

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}


def route(
    x_TD: jax.Array, params: Mapping[str, jax.Array], num_experts_per_tok: int, config: RouterConfig
) -> tuple[jax.Array, jax.Array]:
    """Choose K experts for each token and weight them, in float32 (float64 where x is).

    1. logits = x @ wᵀ (+ logit bias), of x as it is or normalised; scores = score(logits).
    2. The K largest of scores + correction bias, in the eligible groups, are chosen, the lowest
       index first among equals.
    3. The chosen scores, without that bias, are the weights: divided by their sum or p-norm, then scaled, all alike
       or each expert's by its own factor.

    Shazeer et al. 2017 (arXiv:1701.06538), section 2.1; grouped choice and correction bias:
    DeepSeek-V3 (arXiv:2412.19437), section 2.1.2.

    Args:
        x_TD: activations.
        params: "w_router" [E, D]; "b_router" [E] with a logit bias; "correction_bias" [E] with that;
            "expert_scale" [E] and "router_norm" [D] with those.
        num_experts_per_tok: K.
        config: which of the steps apply.

    Returns:
        int32 [T, K] logical experts and [T, K] weights, first choice first.
    """
    return choose_experts(router_logits(x_TD, params, config), params, num_experts_per_tok, config)


def router_logits(x_TD: jax.Array, params: Mapping[str, jax.Array], config: RouterConfig) -> jax.Array:
    """Step 1 of `route` without the score: [T, E] in float32, or float64 where x is."""
    dtype = sum_dtype(x_TD.dtype)
    x_TD = x_TD.astype(dtype)
    if config.input_norm_eps is not None:
        scale_D = params["router_norm"].astype(dtype) * x_TD.shape[-1] ** -0.5
        x_TD = rms_norm(x_TD, scale_D, config.input_norm_eps)
    logits_TE = jnp.einsum(
        "td,ed->te",
        x_TD,
        params["w_router"].astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    if config.logit_bias:
        logits_TE += params["b_router"].astype(dtype)[None]
    return logits_TE


def choose_experts(
    logits_TE: jax.Array, params: Mapping[str, jax.Array], num_experts_per_tok: int, config: RouterConfig
) -> tuple[jax.Array, jax.Array]:
    """The rest of `route`: from logits to int32 [T, K] experts and [T, K] weights in the logits' dtype.

    Raises:
        ValueError: `RouterConfig.function` gives something of another shape or kind.
    """
    if config.function is not None:
        return _chosen_by(config.function, logits_TE, num_experts_per_tok)
    if config.sparsemixer is not None:
        ids_TK, weights_TK = sparsemixer(logits_TE, num_experts_per_tok, config.sparsemixer)
        return ids_TK, _normalize(weights_TK, config) * config.scale
    score = SCORES[config.score]
    scores_TE = logits_TE if config.score_after_top_k else score(logits_TE)
    choice_TE = scores_TE
    if config.correction_bias:
        choice_TE = scores_TE + params["correction_bias"].astype(scores_TE.dtype)[None]
    if config.num_groups > 1:
        eligible_TE = eligible(choice_TE, config)
        choice_TE = jnp.where(eligible_TE, choice_TE, 0 if config.zero_other_groups else -jnp.inf)
        if config.zero_other_groups:
            scores_TE = jnp.where(eligible_TE, scores_TE, 0)
    _, ids_TK = jax.lax.top_k(choice_TE, num_experts_per_tok)
    weights_TK = jnp.take_along_axis(scores_TE, ids_TK, axis=-1)
    if config.score_after_top_k:
        weights_TK = score(weights_TK)
    weights_TK = _normalize(weights_TK, config) * config.scale
    if config.expert_scale:
        weights_TK *= params["expert_scale"].astype(weights_TK.dtype)[ids_TK]
    return ids_TK, weights_TK


def _chosen_by(function: RouterFunction, logits_TE: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """What a user's function chooses, once it is seen to be what it should be."""
    ids_TK, weights_TK = (jnp.asarray(array) for array in function(logits_TE, K))
    shape = (logits_TE.shape[0], K)
    kinds = jnp.issubdtype(ids_TK.dtype, jnp.integer) and jnp.issubdtype(weights_TK.dtype, jnp.floating)
    if ids_TK.shape != shape or weights_TK.shape != shape or not kinds:
        raise ValueError(
            f"a router function gives whole numbers and weights of shape [T, K], here {shape}; "
            f"{getattr(function, '__name__', function)!r} gives {ids_TK.dtype} {ids_TK.shape} and {weights_TK.dtype} "
            f"{weights_TK.shape}"
        )
    return ids_TK.astype(jnp.int32), weights_TK.astype(logits_TE.dtype)


def sparsemixer(logits_TE: jax.Array, num_experts_per_tok: int, jitter: float) -> tuple[jax.Array, jax.Array]:
    """Choose one expert after the other, each weighted by a softmax over those left that come near it.

    Near the largest logit m are the logits s with (m - s) / max(|s|, m) of at most 2 · jitter; two experts close to each
    other so share a weight, and one far ahead of all has weight 1. What SparseMixer-v2 (GRIN-MoE, arXiv:2409.12136)
    leaves of itself at inference.

    Returns:
        int32 [T, K] experts and float32 [T, K] weights, first choice first.
    """
    left_TE, ids, weights = logits_TE, [], []
    for _ in range(num_experts_per_tok):
        largest_T1 = jnp.max(left_TE, axis=-1, keepdims=True)
        far_TE = (largest_T1 - logits_TE) / jnp.maximum(jnp.abs(logits_TE), largest_T1) > 2 * jitter
        id_T = jnp.argmax(left_TE, axis=-1).astype(jnp.int32)
        # The softmax's value at its largest logit.
        weights.append(1 / jnp.sum(jnp.where(far_TE, 0, jnp.exp(left_TE - largest_T1)), axis=-1))
        ids.append(id_T)
        left_TE = jnp.where(jnp.arange(logits_TE.shape[1], dtype=jnp.int32)[None] == id_T[:, None], -jnp.inf, left_TE)
    return jnp.stack(ids, axis=-1).astype(jnp.int32), jnp.stack(weights, axis=-1)


def eligible(choice_TE: jax.Array, config: RouterConfig) -> jax.Array:
    """Bool [T, E], whether an expert is in one of the token's `topk_groups` best groups."""
    T, E = choice_TE.shape
    groups_TGe = choice_TE.reshape(T, config.num_groups, -1)
    count = 1 if config.group_score == "max" else min(2, groups_TGe.shape[-1])
    group_TG = jnp.sum(jax.lax.top_k(groups_TGe, count)[0], axis=-1)
    _, best_TB = jax.lax.top_k(group_TG, config.topk_groups)
    chosen_TG = jnp.any(best_TB[:, :, None] == jnp.arange(config.num_groups, dtype=jnp.int32)[None, None], axis=1)
    return jnp.repeat(chosen_TG, E // config.num_groups, axis=1, total_repeat_length=E)


def _normalize(weights_TK: jax.Array, config: RouterConfig) -> jax.Array:
    if config.p_norm is not None:
        return weights_TK / jnp.sum(weights_TK**config.p_norm, axis=-1, keepdims=True) ** (1 / config.p_norm)
    if not config.renormalize:
        return weights_TK
    total_T1 = jnp.sum(weights_TK, axis=-1, keepdims=True) + config.sum_epsilon
    return weights_TK / jnp.maximum(total_T1, config.min_sum)
