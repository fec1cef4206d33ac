"""Experts that give back their input: values against the dense oracle on every dispatch, and none of their rows is sent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.config import MoEConfig, RouterConfig
from jaxmoe.models.replay import check_trace
from jaxmoe.models.routing import RoutingRecorder, routing_of
from tests.support.covering import pairs
from tests.support.meshes import MESH_SHAPES, mesh_id, mesh_of
from tests.support.oracle import dense_moe, softmax_top_k

pytestmark = pytest.mark.covering(most=3)

E, Z, K, T, D = 11, 5, 4, 26, 16
CONFIG = MoEConfig(
    num_experts=E, zero_experts=Z, num_experts_per_tok=K, hidden_size=D, moe_intermediate_size=8, router=RouterConfig()
)
X = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)


def make(mesh, **arguments) -> jaxmoe.MoE:
    return jaxmoe.MoE(CONFIG, mesh=mesh, rngs=nnx.Rngs(0), **arguments)


def dense(layer: jaxmoe.MoE, ids_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """The sum of experts one by one, and of the input as often as zero experts are chosen."""
    slots = layer.placement.expert_to_slots[:, 0]
    stacks = (np.asarray(stack[...])[slots] for stack in (layer.w_gate_up, layer.w_down))
    return dense_moe(X, ids_TK, weights_TK, *stacks) + np.where(ids_TK < E, 0, weights_TK).sum(axis=1)[:, None] * X


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("mesh_shape", "placement", "dispatch"),
    pairs(MESH_SHAPES, ["linear", "round_robin"], ["auto", "replicated", "all_gather", "all_to_all"]),
    ids=mesh_id,
)
def test_equals_the_dense_oracle(mesh_shape, placement, dispatch):
    layer = make(mesh_of(*mesh_shape), placement=placement, dispatch=dispatch)
    ids_TK, weights_TK = softmax_top_k(X, np.asarray(layer.w_router[...]), K)
    y, stats = layer(jnp.asarray(X))
    np.testing.assert_allclose(y, dense(layer, ids_TK, weights_TK), atol=3e-6)
    counts = np.bincount(ids_TK.reshape(-1), minlength=E + Z)
    assert counts[E:].any()
    np.testing.assert_array_equal(stats.expert_counts, counts[:E])
    np.testing.assert_array_equal(stats.zero_counts, counts[E:])
    np.testing.assert_array_equal(stats.expert_ids, ids_TK)


def given(choices: list[int]) -> np.ndarray:
    return np.tile(np.array(choices, np.int32), (T, 1))


@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
def test_a_token_of_zero_experts_alone_is_sent_nowhere(dispatch):
    layer = make(mesh_of(1, 2, 4), dispatch=dispatch)
    mask = np.arange(T) % 4 > 0
    # Replicas, too: their tables have no entry for a zero expert.
    layer.choose_replicas("random")
    y, stats = layer(jnp.asarray(X), jnp.asarray(mask), expert_ids=jnp.asarray(given([11, 12, 13, 15])))
    logits_TE = X.astype(np.float64) @ np.asarray(layer.w_router[...]).T
    scores_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(axis=1, keepdims=True)
    weights_TK = scores_TE[:, [11, 12, 13, 15]]
    weights_TK /= weights_TK.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(
        y, np.where(mask[:, None], dense(layer, given([11, 12, 13, 15]), weights_TK), 0), atol=3e-6
    )
    assert not stats.expert_counts.any()
    assert stats.zero_counts.tolist() == [mask.sum()] * 3 + [0, mask.sum()]
    if dispatch == "all_to_all":
        assert not stats.rows_sent.any()


def test_gradients_reach_the_input_and_the_router_through_zero_experts():
    layer = make(mesh_of(1, 2, 2), dispatch="all_to_all")
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    ids = jnp.asarray(given([11, 3, 13, 14]))

    def loss(params, x):
        return jnp.sum(nnx.merge(graphdef, params, rest)(x, expert_ids=ids)[0] ** 2)

    grads, dx = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, jnp.asarray(X))
    slots = layer.placement.expert_to_slots[:, 0]
    gate_FD, up_FD = np.asarray(layer.w_gate_up[...])[slots][3]
    down_DF = np.asarray(layer.w_down[...])[slots][3]

    def oracle(w_router, x):
        weights = jax.nn.softmax(x @ w_router.T, axis=-1)[:, jnp.array([11, 3, 13, 14])]
        weights = weights / weights.sum(axis=1, keepdims=True)
        expert = (jax.nn.silu(x @ gate_FD.T) * (x @ up_FD.T)) @ down_DF.T
        return jnp.sum((weights[:, 1:2] * expert + (1 - weights[:, 1:2]) * x) ** 2)

    with jax.default_matmul_precision("highest"):
        d_router, d_x = jax.grad(oracle, argnums=(0, 1))(layer.w_router[...], jnp.asarray(X))
    np.testing.assert_allclose(dx, d_x, atol=2e-4)
    np.testing.assert_allclose(grads["w_router"][...], d_router, atol=2e-4)


def test_a_trace_has_the_experts_alone():
    layer = make(mesh_of(1, 1, 1))
    ids = given([11, 3, 13, 14])
    ids[0] = [11, 12, 13, 14]
    mask = jnp.asarray(np.arange(T) < 3)
    _, stats = layer(jnp.asarray(X), mask, expert_ids=jnp.asarray(ids))
    recorder = RoutingRecorder(token_ids=True)
    recorder.add(routing_of([stats], layer.mesh, token_ids=True))
    trace = recorder.trace()
    assert trace.expert_ids[:, 0].tolist() == [[-1] * 4, [-1, 3, -1, -1], [-1, 3, -1, -1]]
    assert trace.counts[0, 0].tolist() == [0, 0, 0, 2, *[0] * 7]
    np.testing.assert_array_equal(recorder.counts(), trace.total_counts)
    with pytest.raises(ValueError, match="a trace has none of zero experts"):
        check_trace(trace, [CONFIG])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17 is above num_experts=11 with zero_experts=5"),
        ({"zero_experts": -1}, "MoEConfig.zero_experts is an integer of at least 0; got -1"),
        ({"router": RouterConfig(num_groups=3)}, "num_experts=11 with zero_experts=5 is no multiple of num_groups=3"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_choices_beyond_the_zero_experts_are_refused():
    with pytest.raises(ValueError, match=r"4 different experts of 0\.\.15"):
        make(mesh_of(1, 1, 1))(jnp.asarray(X), expert_ids=given([0, 1, 2, 16]))


def test_a_token_meets_as_many_experts_as_an_even_choice_gives():
    assert dataclasses.replace(CONFIG, num_experts=512, zero_experts=256, num_experts_per_tok=12).experts_met == 8
