"""Copies of a model, its arrays given away, and its parameters in logical order."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe import ExpertPlacement
from jaxmoe.models import Decoder, Origin
from jaxmoe.models.qwen3_moe import read_config
from tests.support.families import FAMILIES
from tests.support.meshes import mesh_of

GOLDENS = Path(__file__).parent.parent / "goldens"
TOKENS = np.arange(12).reshape(2, 6)
EXPERTS = 11
SPARE = ExpertPlacement.linear(EXPERTS, 4, num_slots=16)
REPLICAS = ExpertPlacement(EXPERTS, 4, [*reversed(range(EXPERTS)), 3, 3, 7, 0, 1])


@pytest.fixture(scope="module")
def model() -> Decoder:
    return jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 4), placement=SPARE)


@pytest.fixture(scope="module")
def want(model) -> np.ndarray:
    return np.asarray(model(TOKENS))


def check(model: Decoder, want: np.ndarray) -> None:
    np.testing.assert_allclose(model(TOKENS), want, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("arrays", [False, True])
def test_a_copy_and_its_original_are_rebalanced_one_by_one(model, want, arrays) -> None:
    reference, policy = nnx.clone(model), nnx.clone(model, arrays=arrays)
    policy.rebalance(REPLICAS)
    assert reference.placements == [SPARE] * 2
    check(reference, want)
    reference.rebalance(REPLICAS)
    reference.rebalance(SPARE)
    for each in (policy, reference, model):
        check(each, want)


@pytest.mark.full
def test_a_recording_is_of_one_model_object(model) -> None:
    other = nnx.clone(model)
    with model.record_routing() as routing:
        assert other.recorder is None
        other(TOKENS)
        assert routing.num_steps == 0
        with other.record_routing() as its_own:
            other(TOKENS)
        model(TOKENS)
    assert (routing.num_steps, its_own.num_steps) == (1, 1)
    assert model.recorder is other.recorder is None


@pytest.mark.full
def test_one_jit_of_two_models_leaves_each_its_own(model) -> None:
    config = read_config({**FAMILIES["qwen3_moe"], "model_type": "qwen3_moe"})
    first, second = (
        Decoder(config, mesh=mesh_of(1, 1, 4), placement=placement, rngs=nnx.Rngs(0), origin=Origin(Path(name)))
        for placement, name in ((SPARE, "teacher"), (REPLICAS, "student"))
    )
    second.load_report = report = object()
    norm = nnx.jit(lambda model: jnp.sum(model.norm.weight[...]))
    for each in (first, second, first):
        norm(each)
    assert [each.source for each in (first, second)] == [Path("teacher"), Path("student")]
    assert [each.placements[0] for each in (first, second)] == [SPARE, REPLICAS]
    assert first.load_report is None
    assert second.load_report is report
    assert nnx.clone(second).load_report is None
    assert nnx.clone(second).origin == second.origin


def test_a_rebalanced_copy_is_saved_whole(model, tmp_path) -> None:
    copy = nnx.clone(model)
    copy.rebalance(REPLICAS)
    assert copy.origin == model.origin
    jaxmoe.save(copy, tmp_path / "saved")
    saved = jaxmoe.logical_state(jaxmoe.load(tmp_path / "saved", mesh=mesh_of(1, 1, 1)))
    for path, value in jaxmoe.logical_state(model).items():
        np.testing.assert_array_equal(value, saved[path])


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_heads_vocabulary_and_experts_are_the_same_on_every_mesh(family) -> None:
    """On tp=8 key/value heads are copied and the vocabulary is padded; the way there is that of a load."""
    path = GOLDENS / family / "original"
    wide, alone = (jaxmoe.load(path, mesh=mesh_of(*shape)) for shape in ((1, 8, 1), (1, 1, 1)))
    state = jaxmoe.logical_state(alone)
    for name, value in jaxmoe.logical_state(wide).items():
        np.testing.assert_array_equal(value, state[name])
    spread = jaxmoe.load(path, mesh=mesh_of(1, 8, 1))
    zeros = {name: np.zeros(value.shape, value.dtype) for name, value in state.items()}
    jaxmoe.load_logical_state(spread, zeros)
    jaxmoe.load_logical_state(spread, state)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(spread), nnx.state(wide))


def test_a_model_that_was_moved_says_so_in_every_call(model, tmp_path) -> None:
    used = nnx.clone(model)
    moved = jaxmoe.move(used, mesh=mesh_of(1, 1, 2))
    cache = moved.init_cache(2, 8)
    calls = {
        "call": lambda: used(TOKENS),
        "prefill": lambda: used.prefill(TOKENS, np.array([6, 6]), cache),
        "decode": lambda: used.decode(TOKENS[:, 0], np.array([6, 6]), cache),
        "logits": lambda: used.logits_and_stats(TOKENS, np.array([6, 6])),
        "generate": lambda: jaxmoe.generate(used, [[1, 2]], max_new_tokens=1),
        "rebalance": lambda: used.rebalance("linear"),
        "choose_replicas": lambda: used.choose_replicas("random"),
        "record": lambda: used.record_routing().__enter__(),
        "describe": used.describe,
        "save": lambda: jaxmoe.save(used, tmp_path / "saved"),
        "move": lambda: jaxmoe.move(used, mesh=mesh_of(1, 1, 1)),
        "logical_state": lambda: jaxmoe.logical_state(used),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match="jaxmoe.move used this Decoder up: .* use that one"):
            pytest.fail(f"{name} gave {call()}")
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))


@pytest.mark.full
def test_generation_after_the_parameters_were_donated_is_refused(model) -> None:
    policy = nnx.clone(model, arrays=True)
    params = nnx.state(policy, nnx.Param)
    trained = jax.jit(lambda params: jax.tree.map(lambda value: value + 0, params), donate_argnums=0)(params)
    for use in (lambda: jaxmoe.generate(policy, [[5, 6, 7]], max_new_tokens=2), lambda: policy(TOKENS)):
        with pytest.raises(RuntimeError, match=r"the arrays of this Decoder are gone: \S+ was donated .*nnx.update"):
            use()
    nnx.update(policy, trained)
    outs = [jaxmoe.generate(each, [[5, 6, 7]], max_new_tokens=3, ignore_eos=True) for each in (policy, model)]
    assert outs[0][0].token_ids == outs[1][0].token_ids


@pytest.mark.full
def test_tabulate_of_a_model_and_the_model_after_it(model, want) -> None:
    """On four tp ranks key/value heads are copied and the vocabulary is padded, which the table shows."""
    wide = jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 4, 1))
    table = nnx.tabulate(wide, jnp.asarray(TOKENS), console_kwargs={"width": 200})
    assert "[2,6,97]" in table
    assert "[100,32]" in table
    check(model, want)


@pytest.mark.full
def test_tabulate_of_a_model_of_several_streams() -> None:
    streams = jaxmoe.load(GOLDENS / "deepseek_v4" / "original", mesh=mesh_of(1, 1, 1))
    table = nnx.tabulate(streams, jnp.asarray(TOKENS), console_kwargs={"width": 200})
    assert "HyperConnection" in table
    assert "[2,6,97]" in table
