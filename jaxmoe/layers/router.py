"""Routers: from activations to experts and weights, as pure functions.

A score is a function from logits to scores and a line in `SCORES`; `route` composes the rest
from a `RouterConfig`.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.config import MoEConfig, RouterConfig, RouterFunction
from jaxmoe.kernels.dtypes import sum_dtype
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros

SCORES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "softmax": lambda logits: jax.nn.softmax(logits, axis=-1),
    "sigmoid": jax.nn.sigmoid,
    "sqrt_softplus": lambda logits: jnp.sqrt(jax.nn.softplus(logits)),
}


class RouterWeights(NamedTuple):
    """The weights of a layer's router; None for those that its config does not have.

    Also holds what describes them: their parameters, or their partition specs. The layer's parameters have these names.

    Attributes:
        w_router: [E, D], the projection to logits.
        b_router: [E], its bias.
        correction_bias: [E], added to the scores that experts are chosen by.
        expert_scale: [E], factors of the weights.
        router_norm: [D], scale of the input's norm.
    """

    w_router: Any
    b_router: Any = None
    correction_bias: Any = None
    expert_scale: Any = None
    router_norm: Any = None


def make_router_weights(config: MoEConfig, *, param: ParamFactory) -> RouterWeights:
    """Make the parameters that a layer's router has, in float32, or float64 where the layer's are."""
    E, D, router, dtype = config.num_experts, config.hidden_size, config.router, sum_dtype(param.dtype)
    return RouterWeights(
        w_router=param((E, D), dtype=dtype),
        b_router=param((E,), init=zeros, dtype=dtype) if router.logit_bias else None,
        correction_bias=param((E,), init=zeros, dtype=dtype) if router.correction_bias else None,
        expert_scale=param((E,), init=ones, dtype=dtype) if router.expert_scale else None,
        router_norm=param((D,), init=ones, dtype=dtype) if router.input_norm_eps is not None else None,
    )


def route(
    x_TD: jax.Array, weights: RouterWeights | Mapping[str, jax.Array], num_experts_per_tok: int, config: RouterConfig
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
        weights: the router's arrays; a mapping of the same names will do.
        num_experts_per_tok: K.
        config: which of the steps apply.

    Returns:
        int32 [T, K] logical experts and [T, K] weights, first choice first.
    """
    weights = RouterWeights(**weights) if isinstance(weights, Mapping) else weights
    return choose_experts(router_logits(x_TD, weights, config), weights, num_experts_per_tok, config)


def router_logits(x_TD: jax.Array, weights: RouterWeights, config: RouterConfig) -> jax.Array:
    """Step 1 of `route` without the score: [T, E] in float32, or float64 where x is."""
    dtype = sum_dtype(x_TD.dtype)
    x_TD = x_TD.astype(dtype)
    if config.input_norm_eps is not None:
        scale_D = weights.router_norm.astype(dtype) * x_TD.shape[-1] ** -0.5
        x_TD = rms_norm(x_TD, scale_D, config.input_norm_eps)
    logits_TE = jnp.einsum(
        "td,ed->te",
        x_TD,
        weights.w_router.astype(dtype),
        precision=jax.lax.Precision.HIGHEST,
    )
    if config.logit_bias:
        logits_TE += weights.b_router.astype(dtype)[None]
    return logits_TE


def choose_experts(
    logits_TE: jax.Array,
    weights: RouterWeights,
    num_experts_per_tok: int,
    config: RouterConfig,
    expert_ids_TK: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The rest of `route`: from logits to int32 [T, K] experts and [T, K] weights in the logits' dtype.

    Args:
        logits_TE: from `router_logits`.
        weights, num_experts_per_tok, config: as for `route`.
        expert_ids_TK: choices to take instead of the router's own, the first choice first, and all -1 for a token whose
            experts the router chooses. The router weights them all; gradients reach it through the weights alone.

    Raises:
        ValueError: `RouterConfig.function` gives something of another shape or kind, or weights no choices but its own.
    """
    ids_TK, weights_TK = _own_choice(logits_TE, weights, num_experts_per_tok, config)
    if expert_ids_TK is None:
        return ids_TK, weights_TK
    ids_TK = jnp.where(expert_ids_TK < 0, ids_TK, expert_ids_TK)
    if config.function is not None:
        return ids_TK, _weighted_by(config.function, logits_TE, ids_TK)
    return ids_TK, _weigh(logits_TE, ids_TK, weights, config)


def _own_choice(
    logits_TE: jax.Array, weights: RouterWeights, K: int, config: RouterConfig
) -> tuple[jax.Array, jax.Array]:
    """The router's own experts and their weights."""
    if config.function is not None:
        return _checked(config.function, config.function(logits_TE, K), (logits_TE.shape[0], K), logits_TE.dtype)
    if config.sparsemixer is not None:
        ids_TK = sparsemixer(logits_TE, K, config.sparsemixer)[0]
    else:
        choice_TE = logits_TE if config.score_after_top_k else SCORES[config.score](logits_TE)
        if config.correction_bias:
            choice_TE = choice_TE + weights.correction_bias.astype(choice_TE.dtype)[None]
        if config.num_groups > 1:
            choice_TE = jnp.where(eligible(choice_TE, config), choice_TE, 0 if config.zero_other_groups else -jnp.inf)
        _, ids_TK = jax.lax.top_k(choice_TE, K)
    return ids_TK, _weigh(logits_TE, ids_TK, weights, config)


def _weigh(logits_TE: jax.Array, ids_TK: jax.Array, weights: RouterWeights, config: RouterConfig) -> jax.Array:
    """[T, K], the weights of experts that were chosen in this order, whoever chose them."""
    K = ids_TK.shape[1]
    if config.sparsemixer is not None:
        weights_TK = sparsemixer(logits_TE, K, config.sparsemixer, ids_TK)[1]
        return _normalize(weights_TK, config) * config.scale
    score = SCORES[config.score]
    if config.score_after_top_k:
        weights_TK = score(jnp.take_along_axis(logits_TE, ids_TK, axis=-1))
    else:
        weights_TK = jnp.take_along_axis(score(logits_TE), ids_TK, axis=-1)
    if config.num_groups > 1 and config.zero_other_groups:
        # The eligible groups' experts come first; what is chosen beyond them was chosen for want of others.
        weights_TK = weights_TK.at[:, config.topk_groups * logits_TE.shape[1] // config.num_groups :].set(0)
    weights_TK = _normalize(weights_TK, config) * config.scale
    if config.expert_scale:
        weights_TK *= weights.expert_scale.astype(weights_TK.dtype)[ids_TK]
    return weights_TK


def _weighted_by(function: RouterFunction, logits_TE: jax.Array, ids_TK: jax.Array) -> jax.Array:
    """The weights that a user's function gives to choices that are not its own."""
    if "expert_ids" not in inspect.signature(function).parameters:
        raise ValueError(
            "a router function that is to weight given choices takes them as expert_ids=, integers [T, K], and gives them "
            f"back with their weights; {_name(function)!r} has no such parameter"
        )
    found = function(logits_TE, ids_TK.shape[1], expert_ids=ids_TK)
    return _checked(function, found, ids_TK.shape, logits_TE.dtype)[1]


def _checked(
    function: RouterFunction, found: tuple, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """What a user's function gave, once it is seen to be what it should be."""
    ids_TK, weights_TK = (jnp.asarray(array) for array in found)
    kinds = jnp.issubdtype(ids_TK.dtype, jnp.integer) and jnp.issubdtype(weights_TK.dtype, jnp.floating)
    if ids_TK.shape != shape or weights_TK.shape != shape or not kinds:
        raise ValueError(
            f"a router function gives whole numbers and weights of shape [T, K], here {shape}; "
            f"{_name(function)!r} gives {ids_TK.dtype} {ids_TK.shape} and {weights_TK.dtype} {weights_TK.shape}"
        )
    return ids_TK.astype(jnp.int32), weights_TK.astype(dtype)


def _name(function: RouterFunction) -> object:
    return getattr(function, "__name__", function)


def sparsemixer(
    logits_TE: jax.Array, num_experts_per_tok: int, jitter: float, expert_ids_TK: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Choose one expert after the other, each weighted by a softmax over those left that come near it.

    Near the logit m of the one that is chosen are the logits s with (m - s) / max(|s|, m) of at most 2 · jitter; two
    experts close to each other so share a weight, and one far ahead of all has weight 1. What SparseMixer-v2 (GRIN-MoE,
    arXiv:2409.12136) leaves of itself at inference.

    Args:
        logits_TE: float32.
        num_experts_per_tok: K.
        jitter: see above.
        expert_ids_TK: experts to weight in this order; None for the largest logit that is left, each time.

    Returns:
        int32 [T, K] experts and float32 [T, K] weights, first choice first.
    """
    left_TE, ids, weights = logits_TE, [], []
    for k in range(num_experts_per_tok):
        id_T = jnp.argmax(left_TE, axis=-1).astype(jnp.int32) if expert_ids_TK is None else expert_ids_TK[:, k]
        chosen_TE = jnp.arange(logits_TE.shape[1], dtype=jnp.int32)[None] == id_T[:, None]
        logit_T1 = jnp.take_along_axis(left_TE, id_T[:, None], axis=-1)
        far_TE = (logit_T1 - logits_TE) / jnp.maximum(jnp.abs(logits_TE), logit_T1) > 2 * jitter
        near_TE = jax.nn.softmax(jnp.where(far_TE, -jnp.inf, left_TE), axis=-1)
        weights.append(jnp.take_along_axis(near_TE, id_T[:, None], axis=-1)[:, 0])
        ids.append(id_T)
        left_TE = jnp.where(chosen_TE, -jnp.inf, left_TE)
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
