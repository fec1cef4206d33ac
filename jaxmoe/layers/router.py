"""Routers: their weights, and the way from activations to experts and weights of theirs, as pure functions.

The policies that choose are in `jaxmoe.config.routers`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.config import MoEConfig, RouterConfig
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.numerics import sum_dtype


class RouterWeights(NamedTuple):
    """The weights of a layer's router; None for those that its config does not have.

    Also holds what describes them: their parameters, or their partition specs. The layer's parameters have these names.

    E counts `MoEConfig.zero_experts` here, behind the others.

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
    E, D, router, dtype = config.num_choices, config.hidden_size, config.router, sum_dtype(param.dtype)
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

    1. logits = x @ wᵀ (+ logit bias), of x as it is or normalized.
    2. K experts are chosen by their logits, and the correction bias where there is one.
    3. The chosen are weighted by their logits alone, and by the experts' factors where there are any.

    Steps 2 and 3 are the policy's, `RouterConfig.choice`.

    Args:
        x_TD: activations.
        weights: the router's arrays; a mapping of the same names will do.
        num_experts_per_tok: K.
        config: the router's.

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
        logits_TE: logits from `router_logits`.
        weights, num_experts_per_tok, config: arguments of `route`.
        expert_ids_TK: choices to take instead of the router's own, the first choice first, and all -1 for a token whose
            experts the router chooses. The router weights them all; gradients reach it through the weights alone.

    Raises:
        ValueError: a `ChosenByFunction` gives something of another shape or kind, or weights no choices but its own.
    """
    bias_E = weights.correction_bias if config.correction_bias else None
    scale_E = weights.expert_scale if config.expert_scale else None
    ids_TK, weights_TK = config.choice.choose(logits_TE, num_experts_per_tok, bias_E, scale_E)
    if expert_ids_TK is None:
        return ids_TK, weights_TK
    ids_TK = jnp.where(expert_ids_TK < 0, ids_TK, expert_ids_TK)
    return ids_TK, config.choice.weigh(logits_TE, ids_TK, scale_E)
