"""The MoE layer over the shared meshes: values against the dense oracle, shardings, bytes and bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxmoe
from jaxmoe.config import MoEConfig, RouterConfig
from jaxmoe.layers.specs import param_specs
from jaxmoe.placement import ExpertPlacement
from tests.support.covering import pairs
from tests.support.meshes import MESH_SHAPES, mesh_id, mesh_of
from tests.support.oracle import dense_moe, softmax_top_k

pytestmark = pytest.mark.covering(most=3)

CONFIG = MoEConfig(num_experts=11, num_experts_per_tok=3, hidden_size=16, moe_intermediate_size=8)


def logical(layer: jaxmoe.MoE) -> tuple[np.ndarray, np.ndarray]:
    """Expert weights by logical expert, read back through the placement."""
    slots = layer.placement.expert_to_slots[:, 0]
    return np.asarray(layer.w_gate_up[...])[slots], np.asarray(layer.w_down[...])[slots]


def expected(layer: jaxmoe.MoE, x: np.ndarray) -> np.ndarray:
    x_TD = x.reshape(-1, x.shape[-1])
    ids_TK, weights_TK = softmax_top_k(x_TD, np.asarray(layer.w_router[...]), layer.config.num_experts_per_tok)
    return dense_moe(x_TD, ids_TK, weights_TK, *logical(layer)).reshape(x.shape)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(
    ("mesh_shape", "placement", "dispatch"),
    pairs(MESH_SHAPES, ["linear", "round_robin"], ["auto", "replicated", "all_gather", "all_to_all"]),
    ids=mesh_id,
)
def test_equals_the_dense_oracle(mesh_shape, placement, dispatch):
    mesh = mesh_of(*mesh_shape)
    layer = jaxmoe.MoE(CONFIG, mesh=mesh, placement=placement, dispatch=dispatch, rngs=nnx.Rngs(0))
    for shape in [(16,), (0, 16), (2, 5, 16), *([(13, 16)] if dispatch == "auto" else [])]:
        x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
        y, stats = layer(jnp.asarray(x))
        assert y.shape == shape
        assert y.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(y), expected(layer, x), atol=3e-6)
        assert int(stats.expert_counts.sum()) == x.size // 16 * 3


def test_expert_counts_are_those_of_the_router():
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(2, 2, 2), dispatch="all_to_all", rngs=nnx.Rngs(0))
    x = np.random.default_rng(2).normal(size=(21, 16)).astype(np.float32)
    ids_TK, _ = softmax_top_k(x, np.asarray(layer.w_router[...]), 3)
    mask = np.arange(21) % 2 == 0
    _, stats = layer(jnp.asarray(x), jnp.asarray(mask))
    np.testing.assert_array_equal(stats.expert_counts, np.bincount(ids_TK[mask].reshape(-1), minlength=11))
    assert stats.rows_sent.any()
    _, none = layer(jnp.asarray(x), jnp.zeros(21, bool))
    assert not none.rows_sent.any(), "a token that is masked is sent nowhere"


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
def test_masked_tokens_come_back_as_zeros_and_change_nothing(mesh, dispatch):
    layer = jaxmoe.MoE(CONFIG, mesh=mesh, dispatch=dispatch, rngs=nnx.Rngs(0))
    x = np.random.default_rng(3).normal(size=(12, 16)).astype(np.float32)
    mask = np.arange(12) % 3 > 0
    y, _ = layer(jnp.asarray(x), jnp.asarray(mask))
    np.testing.assert_allclose(np.asarray(y), np.where(mask[:, None], expected(layer, x), 0), atol=3e-6)


@pytest.mark.full
@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
def test_replicas_and_padding_anywhere(dispatch):
    slots = [4, -1, 0, 1, 2, 3, 4, -1, 5, 6, 7, 8, 9, 10, 4, 0]
    placement = ExpertPlacement(11, 8, np.array(slots))
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 1, 8), placement=placement, dispatch=dispatch, rngs=nnx.Rngs(0))
    w_gate_up, w_down = logical(layer)
    for param, w in ((layer.w_gate_up, w_gate_up), (layer.w_down, w_down)):
        stacked = np.concatenate([w, np.full_like(w[:1], np.nan)])[slots]
        param.set_value(jax.device_put(stacked, param[...].sharding))
    x = np.random.default_rng(4).normal(size=(64, 16)).astype(np.float32)
    y, _ = layer(jnp.asarray(x))
    np.testing.assert_allclose(np.asarray(y), expected(layer, x), atol=3e-6)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
def test_weights_on_the_input(mesh, dispatch):
    """Every choice as a token of its own: its row times its weight, and what comes out as it is."""
    config = dataclasses.replace(CONFIG, weights_on_input=True)
    layer = jaxmoe.MoE(config, mesh=mesh, dispatch=dispatch, rngs=nnx.Rngs(0))
    x = np.random.default_rng(5).normal(size=(13, 16)).astype(np.float32)
    ids_TK, weights_TK = softmax_top_k(x, np.asarray(layer.w_router[...]), 3)
    rows = (x[:, None] * weights_TK[..., None]).reshape(-1, 16)
    outs = dense_moe(rows, ids_TK.reshape(-1, 1), np.ones((39, 1)), *logical(layer))
    y, _ = layer(jnp.asarray(x))
    np.testing.assert_allclose(np.asarray(y), outs.reshape(13, 3, 16).sum(axis=1), atol=3e-6)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("expert_axes", [("ep",), ("ep", "tp"), ("dp", "ep")])
def test_each_device_holds_its_own_experts_only(mesh, expert_axes):
    layer = jaxmoe.MoE(CONFIG, mesh=mesh, expert_axes=expert_axes, rngs=nnx.Rngs(0))
    slots = layer.placement.num_slots
    width = None if "tp" in expert_axes else "tp"
    for param, dims, shape in (
        (layer.w_gate_up, (expert_axes, None, width, None), (slots, 2, 8, 16)),
        (layer.w_down, (expert_axes, None, width), (slots, 16, 8)),
    ):
        value = param[...]
        assert value.shape == shape
        assert value.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, P(*dims)), value.ndim)
        share = mesh.shape["ep"] * mesh.shape["tp"] * (mesh.shape["dp"] if "dp" in expert_axes else 1)
        for shard in value.addressable_shards:
            assert shard.data.nbytes == value.nbytes // share
    x = np.random.default_rng(5).normal(size=(10, 16)).astype(np.float32)
    # One dispatch for each mesh in turn: all of them on every layout are tests/dispatch's.
    layer.dispatch = ("replicated", "all_gather", "all_to_all")[sum(mesh.shape.values()) % 3]
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x))[0]), expected(layer, x), atol=3e-6)


@pytest.mark.full
def test_output_keeps_tokens_on_their_devices():
    """Each tp rank works on a part of the tokens that its device had; no token moves to another one."""
    mesh = mesh_of(2, 2, 2)
    layer = jaxmoe.MoE(CONFIG, mesh=mesh, dispatch="all_to_all", rngs=nnx.Rngs(0))
    tokens = jax.sharding.NamedSharding(mesh, P(("dp", "ep")))
    y, _ = layer(jax.device_put(np.ones((8, 16), np.float32), tokens))
    assert y.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, P(("dp", "ep", "tp"))), 2)


@pytest.mark.full
def test_workspace_does_not_depend_on_routing_or_duplicate_weights():
    mesh = mesh_of(1, 1, 8)
    config = MoEConfig(num_experts=64, num_experts_per_tok=4, hidden_size=64, moe_intermediate_size=64)
    layer = jaxmoe.MoE(config, mesh=mesh, dispatch="all_to_all", rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(layer)
    compiled = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0]).lower(state, jnp.zeros((256, 64))).compile()
    text = compiled.as_text()
    assert "all-to-all" in text
    # The 64 experts are 8 to a device; an all-gather of them, or a dense product, would show all of them at once.
    assert "f32[64,2,64,64]" not in text
    assert "f32[64,64,64]" not in text
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**20


@pytest.mark.full
def test_bfloat16_is_within_its_rounding():
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 2, 4), dtype=jnp.bfloat16, dispatch="all_to_all", rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(6).normal(size=(32, 16)), jnp.bfloat16)
    y, _ = layer(x)
    assert y.dtype == jnp.bfloat16
    reference = expected(layer, np.asarray(x, np.float32))
    assert np.abs(np.asarray(y, np.float32) - reference).max() < 0.02 * np.abs(reference).max()


@pytest.mark.full
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_router_that_does_not_renormalize(score):
    config = MoEConfig(
        num_experts=11,
        num_experts_per_tok=3,
        hidden_size=16,
        moe_intermediate_size=8,
        router=RouterConfig(score=score, renormalize=False),
    )
    layer = jaxmoe.MoE(config, mesh=mesh_of(1, 1, 1), rngs=nnx.Rngs(0))
    x = np.random.default_rng(7).normal(size=(9, 16)).astype(np.float32)
    logits = x.astype(np.float64) @ np.asarray(layer.w_router[...], np.float64).T
    scores = 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    ids = np.argsort(-scores, axis=1)[:, :3]
    reference = dense_moe(x, ids, np.take_along_axis(scores, ids, axis=1), *logical(layer))
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x))[0]), reference, atol=3e-6)


def test_abstract_layer_allocates_nothing():
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 2, 4))
    specs = {spec.path: spec for spec in param_specs(layer)}
    assert specs["w_gate_up"].shape == (12, 2, 8, 16)
    assert specs["w_gate_up"].rows == tuple(layer.placement.slot_to_expert)
    assert specs["w_gate_up"].source_groups == 11
    assert isinstance(layer.w_gate_up.get_value(), jax.ShapeDtypeStruct)


def test_the_choice_of_a_dispatch_is_explained_and_taken():
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 2, 4), rngs=nnx.Rngs(0))
    for tokens in (1, 2**20):
        choice = layer.explain_dispatch(tokens)
        assert choice.name == min(choice.seconds, key=choice.seconds.get)
        assert layer._plan(tokens, jnp.float32).dispatch.name == choice.name
    assert layer.explain_dispatch(1).name == "replicated"


def test_a_dispatch_that_would_break_on_the_mesh_is_refused_before_there_are_weights(monkeypatch):
    monkeypatch.setattr(jaxmoe.MoE, "_platform", "gpu")
    monkeypatch.setattr("jaxmoe.dispatch.ragged_all_to_all.MOST_RANKS", 4)
    message = "'ragged_all_to_all' cannot run on this mesh: .* 4 ranks, .* with 8, here along ep: use 'all_to_all'"
    with pytest.raises(NotImplementedError, match=message):
        jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 1, 8), dispatch="ragged_all_to_all")
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 2, 4), dispatch="ragged_all_to_all")
    layer.check_dispatch("ragged_all_to_all")
    with pytest.raises(NotImplementedError, match="here along ep and tp"):
        jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 2, 4), expert_axes=("ep", "tp"), dispatch="ragged_all_to_all")


def test_bad_input_is_refused():
    mesh = mesh_of(1, 8, 1)
    with pytest.raises(ValueError, match=r"num_experts_per_tok=12 is above num_experts=11"):
        MoEConfig(num_experts=11, num_experts_per_tok=12, hidden_size=16, moe_intermediate_size=8)
    with pytest.raises(ValueError, match=r"moe_intermediate_size=12 is no multiple of tp=8"):
        jaxmoe.MoE(MoEConfig(num_experts=4, num_experts_per_tok=1, hidden_size=16, moe_intermediate_size=12), mesh=mesh)
    with pytest.raises(ValueError, match=r"expert_axes is .*; got \('tp',\)"):
        jaxmoe.MoE(CONFIG, mesh=mesh, expert_axes=("tp",))
    with pytest.raises(ValueError, match=r"placement strategies are .*linear.*; got 'striped'"):
        jaxmoe.MoE(CONFIG, mesh=mesh, placement="striped")
    with pytest.raises(ValueError, match=r"10 experts on 1 devices, but the layer has 11 experts on 1"):
        jaxmoe.MoE(CONFIG, mesh=mesh, placement=ExpertPlacement.linear(10, 1))
    with pytest.raises(ValueError, match=r"dispatch backends are auto"):
        jaxmoe.MoE(CONFIG, mesh=mesh, dispatch="fast")
    layer = jaxmoe.MoE(CONFIG, mesh=mesh, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"hidden_size=16; got shape \(3, 15\)"):
        layer(jnp.ones((3, 15)))
