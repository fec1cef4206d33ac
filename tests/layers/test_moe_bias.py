"""Biases of experts are added once, however many devices share a token's experts or their width."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe import MoE, MoEConfig
from tests.support.meshes import mesh_of
from tests.support.oracle import silu

CONFIG = MoEConfig(num_experts=4, num_experts_per_tok=2, hidden_size=8, moe_intermediate_size=6, bias=True)


def expected(layer: MoE, x_TD: np.ndarray, stats) -> np.ndarray:
    """Every chosen expert of every token in turn; weights are the softmax over the chosen."""
    stacks = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in ("w_gate_up", "w_down")}
    biases = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in ("b_gate_up", "b_down")}
    logits_TE = x_TD @ np.asarray(layer.w_router[...], np.float64).T
    y_TD = np.zeros_like(x_TD)
    for token, experts in enumerate(np.asarray(stats.expert_ids)):
        weights = np.exp(logits_TE[token, experts])
        for expert, weight in zip(experts, weights / weights.sum(), strict=True):
            gate, up = stacks["w_gate_up"][expert] @ x_TD[token] + biases["b_gate_up"][expert]
            y_TD[token] += weight * (stacks["w_down"][expert] @ (silu(gate) * up) + biases["b_down"][expert])
    return y_TD


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
def test_biases_are_added_once(dispatch):
    layer = MoE(CONFIG, mesh=mesh_of(1, 2, 2), dispatch=dispatch, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for name in ("b_gate_up", "b_down"):
        bias = getattr(layer, name)
        value = bias.get_value()
        bias.set_value(jax.device_put(rng.normal(size=value.shape).astype(np.float32), value.sharding))
    x_TD = rng.normal(size=(12, 8))
    y_TD, stats = layer(jnp.float32(x_TD))
    np.testing.assert_allclose(y_TD, expected(layer, x_TD, stats), atol=1e-5)


def test_a_config_without_biases_has_none():
    layer = MoE(dataclasses.replace(CONFIG, bias=False), mesh=mesh_of(1, 1, 1), rngs=None)
    assert not hasattr(layer, "b_down")
