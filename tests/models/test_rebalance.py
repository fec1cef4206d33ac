"""Recording a model's routing, and placing its experts anew while it runs."""

import numpy as np
import pytest

import jaxmoe
from jaxmoe.generation.programs import programs_of
from jaxmoe.placement.migration import migration_bytes
from tests.support import runs
from tests.support.goldens import GOLDENS, check_greedy, check_logits, read_expected
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering

QWEN = GOLDENS / "qwen3_moe" / "original"
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
K, LAYERS, EXPERTS = 3, 2, 11


LINEAR = jaxmoe.ExpertPlacement.linear(EXPERTS, 4, num_slots=16)


@pytest.fixture(scope="module")
def loaded():
    return jaxmoe.load(QWEN, mesh=mesh_of(1, 2, 4), placement=LINEAR)


@pytest.fixture
def model(loaded):
    """One model for all tests, which compiles its programs once; each finds its experts where they were."""
    if loaded.placements != [LINEAR] * LAYERS:
        loaded.rebalance([LINEAR] * LAYERS)
    return loaded


def placement_with_replicas(seed: int) -> jaxmoe.ExpertPlacement:
    rng = np.random.default_rng(seed)
    return jaxmoe.ExpertPlacement(EXPERTS, 4, rng.permutation([*range(EXPERTS), *rng.integers(0, EXPERTS, 5)]))


@pytest.mark.full
def test_counts_of_a_call(model) -> None:
    tokens = np.arange(60).reshape(3, 20) % 97
    with model.record_routing() as routing:
        model(tokens)
        model(tokens[:1])
    trace = routing.trace()
    assert trace.expert_ids is None
    assert trace.counts.sum(axis=2).tolist() == [[60 * K] * LAYERS, [20 * K] * LAYERS]
    np.testing.assert_array_equal(routing.counts(), trace.counts.sum(axis=0))


@pytest.mark.full
def test_a_record_is_the_same_on_every_mesh(model) -> None:
    other = jaxmoe.load(QWEN, mesh=mesh_of(2, 2, 2), placement="round_robin")
    traces = []
    for each in (model, other):
        with each.record_routing(token_ids=True) as routing:
            each(np.arange(60).reshape(3, 20) % 97)
            jaxmoe.generate(each, PROMPTS, max_new_tokens=6, ignore_eos=True)
        traces.append(routing.trace())
    np.testing.assert_array_equal(traces[0].counts, traces[1].counts)
    np.testing.assert_array_equal(traces[0].expert_ids, traces[1].expert_ids)
    assert traces[0].expert_ids.shape == (60 + 9 + 5 * 3, LAYERS, K)


def test_generation_is_recorded_by_step_without_its_padding(model) -> None:
    plain = jaxmoe.generate(model, PROMPTS, max_new_tokens=6, ignore_eos=True)
    with model.record_routing(token_ids=True) as routing:
        recorded = jaxmoe.generate(model, PROMPTS, max_new_tokens=6, ignore_eos=True)
    after = jaxmoe.generate(model, PROMPTS, max_new_tokens=6, ignore_eos=True)
    assert [out.token_ids for out in plain] == [out.token_ids for out in recorded] == [out.token_ids for out in after]
    assert routing.num_steps == 6
    assert routing.trace().window_sizes.tolist() == [9, 3, 3, 3, 3, 3]


def test_recording_twice_or_nothing_is_refused(model) -> None:
    with model.record_routing() as routing:
        with pytest.raises(RuntimeError, match="one `with model.record_routing"), model.record_routing():
            pass
        assert model.recorder is routing
    assert model.recorder is None
    with pytest.raises(ValueError, match="no step was recorded"):
        routing.trace()


def test_rebalanced_model_computes_the_same_and_compiles_nothing(model) -> None:
    expected = read_expected("qwen3_moe")
    check_logits(model, expected)
    check_greedy(model, expected)
    programs, expert_bytes = set(programs_of(model).compiled), 3 * 32 * 24 * 4
    for seed in range(runs.examples(1, 3)):
        before = model.placements
        after = [placement_with_replicas(2 * seed), placement_with_replicas(2 * seed + 1)]
        moved = model.rebalance(after, num_nodes=2)
        assert model.placements == after
        assert vars(moved) == migration_bytes(before, after, expert_bytes, num_nodes=2)
        check_logits(model, expected)
        check_greedy(model, expected)
    assert set(programs_of(model).compiled) == programs


def test_rebalanced_model_is_saved_whole(model, tmp_path) -> None:
    expected = read_expected("qwen3_moe")
    model.rebalance([placement_with_replicas(0), placement_with_replicas(1)])
    jaxmoe.save(model, tmp_path / "saved")
    check_logits(jaxmoe.load(tmp_path / "saved", mesh=mesh_of(1, 1, 1)), expected)


def test_a_misfit_in_a_late_layer_moves_no_layer(model) -> None:
    before = model.placements
    with pytest.raises(ValueError, match="keeps its 16 slots"):
        model.rebalance([placement_with_replicas(0), jaxmoe.ExpertPlacement.linear(EXPERTS, 4)])
    assert model.placements == before
    check_logits(model, read_expected("qwen3_moe"))


def test_balancer_moves_experts_between_steps(model) -> None:
    expected = read_expected("qwen3_moe")
    prompts = [prompt.tolist() for prompt in expected["prompt"]]
    balancer = jaxmoe.Balancer(window=8, interval=4, threshold=1.0)
    outs = jaxmoe.generate(model, prompts, max_new_tokens=24, ignore_eos=True, balancer=balancer)
    assert [out.token_ids for out in outs] == [greedy[:24].tolist() for greedy in expected["greedy"]]
    moved = [decision for decision in balancer.history if decision.moved]
    assert moved
    assert all(decision.step % 4 == 0 for decision in balancer.history)
    assert all(decision.after < decision.before for decision in moved)
    assert model.placements != [LINEAR] * LAYERS


@pytest.mark.full
def test_a_callback_may_rebalance_the_model(model) -> None:
    expected = read_expected("qwen3_moe")
    seeds = iter(range(100))
    outs = jaxmoe.generate(
        model,
        [prompt.tolist() for prompt in expected["prompt"]],
        max_new_tokens=8,
        ignore_eos=True,
        stream=lambda event: model.rebalance(placement_with_replicas(next(seeds))),
    )
    assert next(seeds) == 8 * len(outs)
    assert [out.token_ids for out in outs] == [greedy[:8].tolist() for greedy in expected["greedy"]]
    check_logits(model, expected)


@pytest.mark.full
def test_balancer_leaves_an_even_model_alone(model) -> None:
    balancer = jaxmoe.Balancer(window=8, interval=4, threshold=4.0)
    before = model.placements
    jaxmoe.generate(model, PROMPTS, max_new_tokens=12, ignore_eos=True, balancer=balancer)
    assert model.placements == before
    assert balancer.history == []


def test_balancer_checks_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"window is an integer of at least 1; got 0"):
        jaxmoe.Balancer(window=0)
    with pytest.raises(ValueError, match=r"knows counts alone: strategy is one of eplb.*'affinity'"):
        jaxmoe.Balancer(strategy="affinity")
