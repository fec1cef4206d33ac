"""Rows that `token_mask` leaves out reach neither a result nor a gradient, whatever they and their cotangents hold."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.config import MLPConfig, MoEConfig, RouterConfig
from jaxmoe.dispatch import DISPATCHES
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=3)

D = 16
PLAIN = MoEConfig(num_experts=6, num_experts_per_tok=2, hidden_size=D, moe_intermediate_size=8)
CONFIGS = {
    "plain": PLAIN,
    "shared_and_latent": dataclasses.replace(
        PLAIN, shared=MLPConfig(hidden_size=D, intermediate_size=8), shared_gate=True, latent_size=8, latent_bias=True
    ),
    "weights_on_input_and_biases": dataclasses.replace(PLAIN, weights_on_input=True, bias=True),
    "normed_router_in_groups": dataclasses.replace(
        PLAIN,
        router=RouterConfig(input_norm_eps=1e-6, score="sigmoid", correction_bias=True, num_groups=3, topk_groups=2),
    ),
    "sparsemixer": dataclasses.replace(PLAIN, router=RouterConfig(sparsemixer=0.1, renormalize=False)),
}
RUNS_HERE = [name for name, backend in DISPATCHES.items() if "cpu" not in backend.cannot_run]
# Two sequences; what is left out stands before, behind, in between, or is a whole sequence.
MASKS = {
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]],
    "between": [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0]],
    "a_sequence": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "all": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}


@cache
def gradients_of(name, dispatch):
    """One program for all masks and values: results, losses and the gradients of everything."""
    layer = jaxmoe.MoE(CONFIGS[name], mesh=mesh_of(1, 2, 4), dispatch=dispatch, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def program(x, router_x, mask, dy):
        def forward(params, x, router_x):
            y, stats = nnx.merge(graphdef, params, rest)(x, mask, router_x)
            return y, stats.load_balancing_loss + stats.router_z_loss, stats.expert_ids

        (y, loss, ids), pullback = jax.vjp(forward, params, x, router_x)
        zero = np.zeros(ids.shape, jax.dtypes.float0)
        return y, loss, pullback((dy, jnp.float32(1), zero))

    return program


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dispatch", RUNS_HERE)
@pytest.mark.parametrize("name", CONFIGS)
def test_they_change_no_gradient(name, dispatch):
    program = gradients_of(name, dispatch)
    x, router_x, dy = np.random.default_rng(0).normal(size=(3, 2, 5, D)).astype(np.float32)
    for kind, mask in MASKS.items():
        keep = np.array(mask, bool)
        clean = program(*(np.where(keep[..., None], a, 0.5) for a in (x, router_x)), keep, dy * keep[..., None])
        assert np.isfinite(clean[1])
        for bad in (np.nan, np.inf, -np.inf, 1e30):
            spoilt = program(
                *(np.where(keep[..., None], a, bad) for a in (x, router_x)), keep, *[np.where(keep[..., None], dy, bad)]
            )
            for (path, a), e in zip(jax.tree.leaves_with_path(spoilt), jax.tree.leaves(clean), strict=True):
                assert np.isfinite(a).all(), (kind, bad, jax.tree_util.keystr(path))
                np.testing.assert_array_equal(a, e, err_msg=f"{kind} {bad} {jax.tree_util.keystr(path)}")
        assert not np.asarray(spoilt[0])[~keep].any()
        for dx in spoilt[2][1:]:
            assert not np.asarray(dx)[~keep].any()


@pytest.mark.full
@pytest.mark.parametrize("dispatch", RUNS_HERE)
def test_gradients_are_those_of_a_call_without_them(dispatch):
    layer = jaxmoe.MoE(CONFIGS["shared_and_latent"], mesh=mesh_of(1, 2, 4), dispatch=dispatch, rngs=nnx.Rngs(0))
    x, dy = np.random.default_rng(1).normal(size=(2, 10, D)).astype(np.float32)
    keep = np.arange(10) % 5 > 1

    def loss(layer, x, mask, dy):
        y, stats = layer(x, mask)
        return jnp.sum(y * dy) + stats.load_balancing_loss + stats.router_z_loss

    gradients = nnx.jit(nnx.value_and_grad(loss))
    value, found = gradients(layer, np.where(keep[:, None], x, np.nan), keep, np.where(keep[:, None], dy, 0))
    expected_value, expected = gradients(layer, x[keep], None, dy[keep])
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for (path, a), e in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5, err_msg=jax.tree_util.keystr(path))
