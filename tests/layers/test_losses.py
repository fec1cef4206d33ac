"""The router's losses and the layer's gradients, over the meshes, against the dense oracle on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.config import MoEConfig
from jaxmoe.layers.losses import load_balancing_loss, router_sums, router_z_loss
from jaxmoe.layers.specs import params_by_path
from tests.support.covering import pairs
from tests.support.dense_training import DenseMoE
from tests.support.meshes import MESH_SHAPES, mesh_of

pytestmark = pytest.mark.covering(most=3)

CONFIG = MoEConfig(num_experts=8, num_experts_per_tok=3, hidden_size=16, moe_intermediate_size=8)
T = 21


def inputs(tokens: int = T) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations, a mask with a third of them out, and a cotangent."""
    rng = np.random.default_rng(1)
    x_TD, dy_TD = rng.normal(size=(2, tokens, CONFIG.hidden_size)).astype(np.float32)
    return 2 * x_TD, np.arange(tokens) % 3 > 0, dy_TD


def losses_in_numpy(logits_TE: np.ndarray, mask_T: np.ndarray, K: int) -> tuple[float, float]:
    """Both losses token by token, in float64."""
    E = logits_TE.shape[1]
    choices_E, probability_E, z = np.zeros(E), np.zeros(E), 0.0
    for logits_E in logits_TE[mask_T].astype(np.float64):
        exponentials_E = np.exp(logits_E)
        probability_E += exponentials_E / exponentials_E.sum()
        choices_E[np.argsort(-logits_E)[:K]] += 1
        z += np.log(exponentials_E.sum()) ** 2
    tokens = mask_T.sum()
    return E * float((choices_E / tokens) @ (probability_E / tokens)), z / tokens


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("mesh_shape", "dispatch", "expert_axes"),
    pairs(MESH_SHAPES, ["replicated", "all_to_all"], [("ep",), ("ep", "tp")]),
    ids=str,
)
def test_losses_are_those_of_the_tokens_that_are_not_masked(mesh_shape, dispatch, expert_axes):
    mesh = mesh_of(*mesh_shape)
    layer = jaxmoe.MoE(CONFIG, mesh=mesh, dispatch=dispatch, expert_axes=expert_axes, rngs=nnx.Rngs(0))
    x_TD, mask_T, _ = inputs()
    balance, z = losses_in_numpy(x_TD @ np.asarray(layer.w_router[...]).T, mask_T, CONFIG.num_experts_per_tok)
    _, stats = layer(jnp.asarray(x_TD), jnp.asarray(mask_T))
    np.testing.assert_allclose(stats.load_balancing_loss, balance, rtol=1e-5)
    np.testing.assert_allclose(stats.router_z_loss, z, rtol=1e-5)


def test_even_routing_has_the_least_balancing_loss():
    """K where every expert is as likely and as often chosen; E · K / K where K experts have everything."""
    E, K, tokens = 8, 2, 12
    ids_TK = jnp.arange(tokens * K).reshape(tokens, K) % E
    every = jnp.ones(tokens, bool)
    even = router_sums(jnp.zeros((tokens, E)), ids_TK, every)
    assert float(load_balancing_loss(even)) == pytest.approx(K)
    collapsed = router_sums(
        jnp.where(jnp.arange(E) < K, 50.0, 0.0) * jnp.ones((tokens, 1)),
        jnp.tile(jnp.arange(K), (tokens, 1)),
        every,
    )
    assert float(load_balancing_loss(collapsed)) == pytest.approx(E)
    assert float(router_z_loss(even)) == pytest.approx(np.log(E) ** 2, rel=1e-6)


def test_no_token_at_all_is_no_loss():
    sums = router_sums(jnp.ones((4, 8)), jnp.zeros((4, 2), jnp.int32), jnp.zeros(4, bool))
    assert float(load_balancing_loss(sums)) == float(router_z_loss(sums)) == 0


def gradients(layer: nnx.Module, x_TD, mask_T, dy_TD) -> dict[str, np.ndarray]:
    """Of Σ dy · y + losses, in x and in every parameter."""
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    @jax.grad
    def gradient(inputs):
        params, x_TD = inputs
        y_TD, stats = nnx.merge(graphdef, params, rest)(x_TD, mask_T)
        return jnp.sum(y_TD * dy_TD) + 3 * stats.load_balancing_loss + stats.router_z_loss

    params, dx_TD = gradient((params, x_TD))
    return {path: np.asarray(param.get_value()) for path, param in params_by_path(params).items()} | {"x": dx_TD}


@pytest.fixture(scope="module")
def dense_gradients() -> dict[str, np.ndarray]:
    one = jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 1, 1), rngs=nnx.Rngs(0))
    return gradients(DenseMoE(one), *(jnp.asarray(a) for a in inputs()))


# Where tp is 1, experts over it as well are the same program.
@pytest.mark.full
@pytest.mark.parametrize(
    ("shape", "expert_axes"),
    [
        *((shape, ("ep",)) for shape in [(1, 1, 1), *MESH_SHAPES]),
        *((shape, ("ep", "tp")) for shape in MESH_SHAPES if shape[1] > 1),
    ],
    ids=str,
)
def test_gradients_are_the_dense_oracles(shape, expert_axes, dense_gradients):
    x_TD, mask_T, dy_TD = (jnp.asarray(a) for a in inputs())
    expected = dense_gradients
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(*shape), dispatch="replicated", expert_axes=expert_axes, rngs=nnx.Rngs(0))
    actual = gradients(layer, x_TD, mask_T, dy_TD)
    assert actual.keys() == expected.keys() == {"w_router", "w_gate_up", "w_down", "x"}
    for name, gradient in actual.items():
        np.testing.assert_allclose(gradient, expected[name], rtol=2e-5, atol=2e-5, err_msg=name)
