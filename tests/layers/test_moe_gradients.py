"""Gradients of the whole layer, router included, against a dense layer's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.config import MoEConfig
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=2)

CONFIG = MoEConfig(num_experts=11, num_experts_per_tok=3, hidden_size=16, moe_intermediate_size=8)


def dense(x_TD, w_router, w_gate_up, w_down):
    """Softmax, the three largest renormalized, every expert applied to every token."""
    scores_TE = jax.nn.softmax(x_TD @ w_router.T)
    top_TK, ids_TK = jax.lax.top_k(scores_TE, 3)
    weights_TE = jnp.zeros_like(scores_TE)
    for k in range(3):
        weights_TE += jax.nn.one_hot(ids_TK[:, k], 11) * (top_TK / top_TK.sum(axis=1, keepdims=True))[:, k, None]
    gate, up = jnp.einsum("td,ehfd->hetf", x_TD, w_gate_up)
    return jnp.einsum("te,etf,edf->td", weights_TE, jax.nn.silu(gate) * up, w_down)


@jax.jit
def dense_gradients(dy_TD, *inputs):
    return jax.grad(lambda *inputs: jnp.sum(dense(*inputs) * dy_TD), argnums=(0, 1, 2, 3))(*inputs)


@pytest.mark.full
@pytest.mark.parametrize(
    ("mesh_shape", "expert_axes"),
    [((1, 1, 8), ("ep",)), ((2, 2, 2), ("ep",)), ((2, 2, 2), ("dp", "ep")), ((1, 2, 4), ("ep", "tp"))],
)
@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
def test_equal_those_of_a_dense_layer(mesh_shape, expert_axes, dispatch):
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(*mesh_shape), expert_axes=expert_axes, dispatch=dispatch, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    x_TD, dy_TD = rng.normal(size=(2, 21, 16)).astype(np.float32)

    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def gradients(params, x_TD):
        def loss(params, x_TD):
            return jnp.sum(nnx.merge(graphdef, params, rest)(x_TD)[0] * dy_TD)

        return jax.grad(loss, argnums=(0, 1))(params, x_TD)

    ours, dx = gradients(params, x_TD)
    slots = layer.placement.expert_to_slots[:, 0]
    weights = [layer.w_router[...], layer.w_gate_up[...][slots], layer.w_down[...][slots]]
    with jax.default_matmul_precision("highest"):
        expected = dense_gradients(dy_TD, x_TD, *weights)
    found = (dx, ours["w_router"][...], ours["w_gate_up"][...][slots], ours["w_down"][...][slots])
    for name, mine, theirs in zip(("x", "w_router", "w_gate_up", "w_down"), found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(1, np.abs(theirs).max()), err_msg=name)
    for name in ("w_gate_up", "w_down"):
        assert ours[name][...].sharding.is_equivalent_to(params[name][...].sharding, params[name][...].ndim)
