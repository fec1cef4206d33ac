"""MoE layers whose replicas hold the same weights and whose padding holds NaN, and values for abstract modules."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe import MoE, MoEConfig
from jaxmoe.layers import param_specs, params_by_path
from tests.support.meshes import mesh_of

E, D, F, SLOTS = 11, 16, 24, 16


def make_layer(shape, axes, placement, *, dtype=jnp.float32, bias=False) -> MoE:
    """A layer whose replicas hold the same weights, as a loader leaves them."""
    config = MoEConfig(num_experts=E, num_experts_per_tok=3, hidden_size=D, moe_intermediate_size=F, bias=bias)
    layer = MoE(config, mesh=mesh_of(*shape), placement=placement, expert_axes=axes, dtype=dtype, rngs=nnx.Rngs(0))
    for index, stack in enumerate(layer.expert_stacks()):
        value = stack.get_value()
        experts = np.random.default_rng(index).normal(size=(E, *value.shape[1:])) / np.sqrt(value.shape[-1])
        held = np.where(
            (placement.slot_to_expert >= 0).reshape(-1, *(1,) * (value.ndim - 1)),
            experts[placement.slot_to_expert],
            np.nan,
        )
        stack.set_value(jax.device_put(held.astype(value.dtype), value.sharding))
    return layer


def fill(module: nnx.Module) -> None:
    """Give an abstract module the values that it would have from one checkpoint, whatever its mesh."""
    rng = np.random.default_rng(2)
    for spec, param in zip(param_specs(module), params_by_path(module).values(), strict=True):
        rows = spec.rows or tuple(range(spec.shape[0]))
        groups = spec.source_groups or spec.shape[0]
        source = rng.normal(size=(groups, spec.shape[0] // len(rows), *spec.shape[1:])).astype(np.float32)
        param.set_value(jax.device_put(source[list(rows)].reshape(spec.shape), spec.sharding))
