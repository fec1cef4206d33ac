"""Checks of what a MoE layer is made of and called with, each with its rule and the way out."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxmoe.checks import instance_of
from jaxmoe.config import MoEConfig
from jaxmoe.mesh import DP, EP, TP
from jaxmoe.placement.trace import check_choices


def check_made_of(config: Any, mesh: Any, rngs: Any, dtype: Any, expert_axes: Any) -> None:
    """Refuse arguments of a layer that are of another kind or value than any layer takes.

    Raises:
        TypeError: `config`, `mesh` or `rngs` is something else.
        ValueError: see `check_layer_dtype` and `check_expert_axes`.
    """
    instance_of("config", config, MoEConfig, "a jaxmoe.MoEConfig")
    instance_of("mesh", mesh, (Mesh, AbstractMesh), "a mesh, from jaxmoe.make_mesh or of your own")
    if rngs is not None:
        instance_of("rngs", rngs, nnx.Rngs, "flax.nnx.Rngs, or None for a layer without weights")
    check_layer_dtype(dtype)
    check_expert_axes(expert_axes)


def check_layer_dtype(dtype: Any) -> None:
    """Refuse a dtype that the weights of a layer cannot have.

    Raises:
        ValueError: it is none of float32, bfloat16, float16 and float64, or float64 where JAX has no 64-bit numbers.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise ValueError(f"dtype is float32, bfloat16, float16 or float64; got {dtype!r:.80}")
    if name == "float64" and not jax.config.jax_enable_x64:
        raise ValueError('dtype float64 needs 64-bit numbers: jax.config.update("jax_enable_x64", True)')


def check_expert_axes(expert_axes: tuple[str, ...] | str) -> None:
    """Refuse expert axes that no code path serves.

    Raises:
        ValueError: not ("ep",), ("ep", "tp") or ("dp", "ep").
    """
    if isinstance(expert_axes, str) or tuple(expert_axes) not in ((EP,), (EP, TP), (DP, EP)):
        raise ValueError(f'expert_axes is ("ep",), ("ep", "tp") or ("dp", "ep"); got {expert_axes!r}')


def check_not_recorded(recorder: Any, layer: nnx.Module, weight: Any) -> None:
    """Refuse a call of a layer by itself while the routing of its model is recorded.

    Args:
        recorder: recorder of the model; None while nothing is recorded.
        layer: layer that is called.
        weight: array of the layer, traced where the call is.

    Raises:
        RuntimeError: the call would be missing from the record.
    """
    if recorder is not None and recorder.records(layer, weight):
        raise RuntimeError(
            "the routing of this layer's model is being recorded, and the record is of model(tokens) and "
            "jaxmoe.generate alone; call the layer, or a method that returns statistics, outside of "
            "`with model.record_routing()`"
        )


def check_slots(slots: int, placed: int) -> None:
    """Refuse expert stacks and placement tables that belong to different layers.

    Raises:
        ValueError: the stacks have another number of slots than the placement.
    """
    if slots != placed:
        raise ValueError(
            f"expert stacks lie by the layer's placement: they have {slots} slots and the placement {placed}; give the "
            "layer a whole state, placement tables too, and not nnx.Param alone, or use jaxmoe.load_logical_state"
        )


def checked_tokens(x: Any, hidden_size: int, dtype: np.dtype) -> jax.Array:
    """Make x an array [..., D] in the layer's dtype.

    Raises:
        ValueError: it has another last dim or another dtype.
    """
    x = jnp.asarray(x)
    if x.ndim == 0 or x.shape[-1] != hidden_size:
        raise ValueError(f"the last dim of x is hidden_size={hidden_size}; got shape {x.shape}")
    if x.dtype != dtype:
        raise ValueError(f"x has the dtype of the layer, {dtype}; got {x.dtype}: convert it with astype")
    return x


def checked_mask(token_mask: Any, x: jax.Array) -> jax.Array | None:
    """Make the mask an array, one bool for each token of x; None where there is none.

    Raises:
        ValueError: it has another shape or dtype.
    """
    if token_mask is None:
        return None
    token_mask = jnp.asarray(token_mask)
    if token_mask.shape != x.shape[:-1] or token_mask.dtype != bool:
        raise ValueError(
            f"token_mask is bool {list(x.shape[:-1])}, one for each token of x {list(x.shape)}; got "
            f"{token_mask.dtype} {list(token_mask.shape)}"
        )
    return token_mask


def checked_router_input(router_x: Any, x: jax.Array) -> jax.Array | None:
    """Make the router's own input an array of x's shape; None where it looks at x.

    Raises:
        ValueError: it has another shape, or is not floating point.
    """
    if router_x is None:
        return None
    router_x = jnp.asarray(router_x)
    if router_x.shape != x.shape or not jnp.issubdtype(router_x.dtype, jnp.floating):
        raise ValueError(
            f"router_x has the shape of x, {list(x.shape)}, and is floating point; got {router_x.dtype} "
            f"{list(router_x.shape)}"
        )
    return router_x


def checked_choices(expert_ids: Any, x: jax.Array, config: MoEConfig) -> jax.Array | None:
    """Make given choices int32 [..., K], and check them as far as can be done here; None where there are none.

    Raises:
        ValueError: they have another shape or dtype, or name experts that the layer does not have.
    """
    if expert_ids is None:
        return None
    tokens, K = x.shape[:-1], config.num_experts_per_tok
    if jnp.shape(expert_ids) != (*tokens, K) or not jnp.issubdtype(jnp.result_type(expert_ids), jnp.integer):
        raise ValueError(
            f"expert_ids are integers {[*tokens, K]}, num_experts_per_tok={K} for each token; got "
            f"{jnp.result_type(expert_ids)} {list(jnp.shape(expert_ids))}"
        )
    if not isinstance(expert_ids, jax.core.Tracer):
        check_choices(np.asarray(expert_ids).reshape(-1, K), config.num_choices)
    return jnp.asarray(expert_ids, jnp.int32)
