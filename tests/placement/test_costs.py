"""What a placement costs: traffic, balance, replica choice, migration, time, comparison."""

import dataclasses
import json
import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.hardware import GPUS, Links
from jaxmoe.placement import STRATEGIES, ExpertPlacement, PlacementTask, RoutingTrace
from jaxmoe.placement import balance as published
from jaxmoe.placement.compare import compare
from jaxmoe.placement.cost import CostModel
from jaxmoe.placement.metrics import evaluate, expected_destinations
from jaxmoe.placement.migration import align, migration_bytes, plan_migration
from jaxmoe.placement.optimum import optimal_max_load, optimal_split
from jaxmoe.placement.replicas import REPLICA_CHOICES, ReplicaContext, get_replica_choice
from jaxmoe.placement.synthetic import synthetic_trace
from jaxmoe.placement.traffic import BETWEEN, DEDUPLICATIONS, WITHIN, device_loads, route_trace

pytestmark = pytest.mark.covering

COST = CostModel.for_sizes(hidden_size=64, moe_intermediate_size=32)
TRACE = synthetic_trace(num_experts=16, experts_per_token=3, num_layers=2, num_windows=4, tokens_per_window=60)
REPLICATED = ExpertPlacement.from_counts(TRACE.total_counts, ep=4, num_slots=24)


# --- balance


def test_published_definitions() -> None:
    # Two windows of two layers on two devices.
    loads = np.array([[[3, 1], [2, 2]], [[10, 0], [0, 0]]])
    assert published.max_over_mean(loads).tolist() == [[1.5, 1], [2, 1]]
    assert published.vllm_balancedness(loads) == pytest.approx((2 + 2 + 5) / (3 + 2 + 10))
    assert published.sglang_balancedness(loads) == pytest.approx((2 / 3 + 1 + 1 / 2 + 1) / 4, abs=1e-5)
    assert published.tensorrt_llm_imbalance(loads) == pytest.approx((0.5 + 0 + 1 + 0) / 4)


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_definitions_agree_on_what_is_level(n, seed) -> None:
    loads = np.random.default_rng(seed).integers(0, 5, (3, 2, n))
    assert 1 / n - 1e-9 <= published.vllm_balancedness(loads) <= 1
    assert 1 / n - 1e-4 <= published.sglang_balancedness(loads) <= 1
    assert 0 <= published.tensorrt_llm_imbalance(loads) <= n - 1
    level = np.full((1, 2, n), 7)
    assert published.vllm_balancedness(level) == published.sglang_balancedness(level) == 1
    assert published.tensorrt_llm_imbalance(level) == 0


# --- replica choice


@pytest.mark.parametrize("name", REPLICA_CHOICES)
@pytest.mark.parametrize("placement", [REPLICATED[0], ExpertPlacement.linear(16, 4), ExpertPlacement.linear(16, 16)])
def test_every_choice_is_a_slot_of_the_expert(name, placement) -> None:
    ids = np.where(np.arange(180).reshape(60, 3) % 7 == 0, -1, TRACE.expert_ids[:60, 0])
    home = np.arange(60) * placement.ep // 60
    context = ReplicaContext(
        home=home, turn=np.arange(60), devices_per_node=max(1, placement.ep // 2), last_load=np.arange(placement.ep)
    )
    slots = get_replica_choice(name)(ids, placement, context)
    assert slots.shape == ids.shape
    assert (slots[ids < 0] == -1).all()
    assert (placement.slot_to_expert[slots[ids >= 0]] == ids[ids >= 0]).all()
    assert np.array_equal(slots, get_replica_choice(name)(ids, placement, context))


def context_of(ep: int, home: list[int], **more) -> ReplicaContext:
    fields = {"turn": np.arange(len(home)), "devices_per_node": 2, "last_load": np.zeros(ep)}
    return ReplicaContext(home=np.array(home), **(fields | more))


def test_modulo_takes_turns() -> None:
    placement = ExpertPlacement(2, 2, [0, 1, 0, 1])
    assert REPLICA_CHOICES["modulo"](np.array([[0], [0], [1]]), placement, context_of(2, [0, 0, 0])).tolist() == [
        [0],
        [2],
        [1],
    ]


def test_local_first_prefers_the_device_then_the_node() -> None:
    # Devices 0, 1 | 2, 3: expert 0 is on 1 and 2, expert 1 on 0, 1 and 3.
    placement = ExpertPlacement(2, 4, [1, -1, 0, 1, 0, -1, 1, -1])
    ids, home = np.array([[0], [0], [0], [0], [1], [1], [1]]), [0, 1, 2, 3, 1, 2, 3]
    slots = REPLICA_CHOICES["local_first"](ids, placement, context_of(4, home))
    assert (slots[:, 0] // 2).tolist() == [1, 1, 2, 2, 1, 3, 3]


def test_least_loaded_follows_the_last_window() -> None:
    placement = ExpertPlacement(2, 2, [0, 1, 0, 1])
    context = context_of(2, [0, 1], last_load=np.array([5, 3]))
    assert REPLICA_CHOICES["least_loaded"](np.array([[0], [1]]), placement, context).tolist() == [[2], [3]]


def test_random_is_seeded() -> None:
    placement, ids = ExpertPlacement(1, 8, [0] * 8), np.zeros((400, 1), int)
    first, again, other = (
        REPLICA_CHOICES["random"](ids, placement, context_of(8, [0] * 400, seed=seed)) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.bincount(first[:, 0]).min() > 25


@pytest.mark.full
@pytest.mark.parametrize("name", REPLICA_CHOICES)
def test_no_choice_beats_the_linear_program(name) -> None:
    rows = route_trace(TRACE, REPLICATED, replica_choice=name).rows.sum(axis=0)
    for layer, placement in enumerate(REPLICATED):
        bound = optimal_max_load(TRACE.total_counts[layer], placement)
        assert rows[layer].max() >= bound * (1 - 1e-9)
        assert bound >= TRACE.total_counts[layer].sum() / 4 * (1 - 1e-9)


@settings(max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_the_optimal_split_is_one(seed) -> None:
    rng = np.random.default_rng(seed)
    counts, speeds = rng.integers(0, 100, 6), rng.uniform(0.5, 2, 3)
    placement = ExpertPlacement(6, 3, rng.permutation([*range(6), *rng.integers(-1, 6, 6)]))
    split = optimal_split(counts, placement, device_speeds=speeds)
    filled = placement.slot_to_expert >= 0
    per_expert = np.bincount(placement.slot_to_expert[filled], weights=split.slot_load[filled], minlength=6)
    assert per_expert == pytest.approx(counts, abs=1e-6)
    assert (split.slot_load >= -1e-9).all()
    assert (split.slot_load.reshape(3, -1).sum(axis=1) / speeds).max() == pytest.approx(split.max_load, abs=1e-6)
    evenly = device_loads(counts[None], [placement])[0] / speeds
    assert split.max_load <= evenly.max() + 1e-6


def test_without_scipy_the_bound_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        optimal_max_load(np.ones(16), REPLICATED[0])


# --- traffic


def traffic_one_by_one(trace: RoutingTrace, placement: ExpertPlacement, num_nodes: int, mode: str) -> np.ndarray:
    """Copies [n, n] of a trace of one layer without replicas, token by token."""
    n = placement.ep
    per_node = n // num_nodes
    copies = np.zeros((n, n), int)
    start = 0
    for size in trace.window_sizes:
        for index, ids in enumerate(trace.expert_ids[start : start + size, 0]):
            home = index * n // size
            targets = [int(placement.expert_to_slots[e, 0]) // placement.slots_per_device for e in ids if e >= 0]
            if mode == "none":
                for target in targets:
                    copies[home, target] += 1
                continue
            entered = set()
            for target in sorted(set(targets)):
                node = target // per_node
                if mode == "device" or node == home // per_node:
                    copies[home, target] += 1
                    continue
                entry = node * per_node + home % per_node
                if node not in entered:
                    copies[home, entry] += 1
                    entered.add(node)
                if entry != target:
                    copies[entry, target] += 1
        start += size
    return copies


@settings(max_examples=30)
@given(
    st.sampled_from(DEDUPLICATIONS),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (6, 2)]),
    st.integers(0, 2**32 - 1),
)
def test_copies_are_those_of_a_plain_loop(mode, devices, seed) -> None:
    (n, num_nodes), rng = devices, np.random.default_rng(seed)
    trace = RoutingTrace.from_expert_ids(rng.integers(-1, 12, (rng.integers(1, 30), 1, 3)), 12, window=7)
    placement = ExpertPlacement.from_device_experts(12, np.array_split(rng.permutation(12), n))
    traffic = route_trace(trace, [placement], num_nodes=num_nodes, deduplicate=mode)
    assert np.array_equal(traffic.copies[0], traffic_one_by_one(trace, placement, num_nodes, mode))
    remote = traffic.copies[0] - np.diag(np.diag(traffic.copies[0]))
    assert traffic.sent.sum() == traffic.received.sum() == remote.sum()
    assert traffic.rows.sum() == trace.counts.sum()


def test_deduplication_saves_copies_and_nodes() -> None:
    sent = {
        mode: route_trace(TRACE, REPLICATED, num_nodes=2, deduplicate=mode).sent.sum(axis=(0, 1, 3))
        for mode in DEDUPLICATIONS
    }
    assert sent["device"].sum() < sent["none"].sum()
    assert sent["node"][BETWEEN] < sent["device"][BETWEEN]
    assert sent["node"][WITHIN] > sent["device"][WITHIN]


@pytest.mark.parametrize("name", REPLICA_CHOICES)
def test_load_is_conserved(name) -> None:
    traffic = route_trace(TRACE, REPLICATED, replica_choice=name)
    assert np.array_equal(traffic.rows.sum(axis=2), TRACE.counts.sum(axis=2))
    assert (traffic.active_slots <= 6).all()
    assert (traffic.distinct_destinations >= 1).all()


def test_counts_alone_give_loads_and_a_bound_on_traffic() -> None:
    exact, estimate = (route_trace(t, REPLICATED) for t in (TRACE, RoutingTrace(counts=TRACE.counts)))
    assert estimate.distinct_destinations is None
    assert estimate.rows == pytest.approx(device_loads(TRACE.counts, REPLICATED))
    assert estimate.rows.sum() == exact.rows.sum()
    assert estimate.sent.sum() == pytest.approx(0.75 * TRACE.counts.sum())
    assert estimate.sent.sum() > exact.sent.sum()


def test_loads_are_of_every_layer() -> None:
    with pytest.raises(ValueError, match=r"counts are of every layer, \[..., L, E\]; got shape \(16,\)"):
        device_loads(np.ones(16), REPLICATED)


def test_destinations_of_uniform_routing() -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((4000, 1, 32)), axis=2)[:, :, :6]
    traffic = route_trace(RoutingTrace.from_expert_ids(ids, 32), [ExpertPlacement.linear(32, 8)])
    expected = expected_destinations(32, 6, 8)
    assert expected == pytest.approx(8 * (1 - math.comb(28, 6) / math.comb(32, 6)))
    assert traffic.distinct_destinations[0] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placements": REPLICATED[:1]}, "2 layers of 16 experts need 2 placements"),
        ({"placements": [ExpertPlacement.linear(16, 4), ExpertPlacement.linear(16, 8)]}, "equally many devices"),
        ({"placements": [ExpertPlacement.linear(8, 4)] * 2}, "16 experts need"),
        ({"num_nodes": 3}, "4 devices are no multiple of num_nodes=3"),
        ({"replica_choice": "best"}, "replica choices are .*; got 'best'"),
        ({"deduplicate": "rack"}, "deduplicate is one of none, device, node; got 'rack'"),
    ],
)
def test_traffic_that_does_not_fit_is_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        route_trace(**({"trace": TRACE, "placements": REPLICATED} | change))


# --- time


def test_experts_without_a_gate_have_two_matrices() -> None:
    plain = CostModel.for_sizes(hidden_size=64, moe_intermediate_size=32, gated=False)
    assert (plain.expert_bytes, plain.flops_per_row) == (COST.expert_bytes * 2 / 3, COST.flops_per_row * 2 / 3)
    assert plain.token_bytes == COST.token_bytes


def test_step_time_is_the_slowest_device() -> None:
    links = Links(within=5, between=1, latency=0.25)
    device = dataclasses.replace(GPUS["h100"], flops=2, memory_bandwidth=50, links=links)
    cost = CostModel(token_bytes=10, expert_bytes=100, flops_per_row=4, device=device)
    # Two tokens, at home on devices 0 and 1, both of expert 0 on device 0.
    trace = RoutingTrace.from_expert_ids(np.array([[[0]], [[0]]]), 2)
    seconds = cost.layer_seconds(route_trace(trace, [ExpertPlacement.linear(2, 2)]))
    # Device 0: two rows of arithmetic, 4 s, more than reading an expert, 2 s; one copy of 10 bytes at 5/s each way.
    assert seconds.tolist() == [[4 + 2 * (0.25 + 2)]]
    apart = cost.layer_seconds(route_trace(trace, [ExpertPlacement.linear(2, 2)], num_nodes=2))
    assert apart.tolist() == [[4 + 2 * (0.25 + 10)]]
    with pytest.raises(ValueError, match="expert_bytes is a finite number of at least 0; got nan"):
        CostModel(token_bytes=1, expert_bytes=np.nan, flops_per_row=1)


# --- migration


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ExpertPlacement, ExpertPlacement, int]:
    """Two placements of the same experts on the same devices, and a number of nodes."""
    num_experts, num_nodes = draw(st.integers(1, 10)), draw(st.integers(1, 3))
    ep = num_nodes * draw(st.integers(1, 3))
    size = num_experts + draw(st.integers(0, 8))
    size += -size % ep
    both = []
    for _ in range(2):
        more = draw(
            st.lists(st.integers(-1, num_experts - 1), min_size=size - num_experts, max_size=size - num_experts)
        )
        both.append(ExpertPlacement(num_experts, ep, draw(st.permutations([*range(num_experts), *more]))))
    return both[0], both[1], num_nodes


@given(pairs())
def test_a_migration_gives_the_placement_after(case) -> None:
    before, after, num_nodes = case
    migration = plan_migration(before, after, num_nodes=num_nodes)
    slots = np.where(after.slot_to_expert < 0, -1, before.slot_to_expert)
    for move in migration.moves:
        slots[move.slot] = before.slot_to_expert[move.source]
    assert np.array_equal(slots, after.slot_to_expert)
    p, per_node = before.slots_per_device, before.ep // num_nodes
    for move in migration.moves:
        assert before.slot_to_expert[move.slot] != move.expert
        holders = np.flatnonzero(before.device_replicas[:, move.expert])
        device = move.slot // p
        nearest = min(0 if h == device else 1 if h // per_node == device // per_node else 2 for h in holders)
        assert move.distance == nearest
    assert sum(migration.bytes(7).values()) == 7 * len(migration.moves)
    assert plan_migration(after, after).moves == ()


@given(pairs())
def test_aligning_moves_less_and_changes_no_load(case) -> None:
    before, after, num_nodes = case
    aligned = align(before, after, num_nodes=num_nodes)
    per_node = before.ep // num_nodes
    for node in range(num_nodes):
        devices = range(node * per_node, (node + 1) * per_node)
        contents = [sorted(sorted(p.device_experts(device)) for device in devices) for p in (after, aligned)]
        assert contents[0] == contents[1]
    assert align(after, after, num_nodes=num_nodes) == after
    stays = [(before.slot_to_expert == p.slot_to_expert).sum() for p in (after, aligned)]
    if per_node == 1:
        assert stays[1] >= stays[0]


def test_sources_are_shared_out() -> None:
    # Expert 0 is on devices 0 and 1, and devices 2 and 3 want it.
    before = ExpertPlacement(3, 4, [0, 0, 1, 2])
    after = ExpertPlacement(3, 4, [1, 2, 0, 0])
    moves = plan_migration(before, after).moves
    assert {move.source for move in moves if move.expert == 0} == {0, 1}


def test_migrations_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="same experts on the same devices: got 4 on 2 and 4 on 4"):
        plan_migration(ExpertPlacement.linear(4, 2), ExpertPlacement.linear(4, 4))
    with pytest.raises(ValueError, match="4 devices are no multiple of num_nodes=3"):
        plan_migration(ExpertPlacement.linear(4, 4), ExpertPlacement.linear(4, 4), num_nodes=3)
    with pytest.raises(ValueError, match="same experts, devices and slots"):
        align(ExpertPlacement.linear(4, 2), ExpertPlacement.linear(4, 2, num_slots=6))


# --- all of it


def test_metrics_are_those_of_their_parts() -> None:
    linear = [ExpertPlacement.linear(16, 4)] * 2
    metrics = evaluate(REPLICATED, TRACE, COST, num_nodes=2, before=linear)
    traffic = route_trace(TRACE, REPLICATED, num_nodes=2)
    assert metrics.vllm_balancedness == published.vllm_balancedness(traffic.rows)
    assert metrics.between_node_bytes == traffic.sent[:, :, BETWEEN].sum() / 4 * 2 * COST.token_bytes
    assert metrics.extra_memory_bytes == 2 * (24 - 16) * COST.expert_bytes
    assert metrics.migration_bytes == migration_bytes(linear, REPLICATED, int(COST.expert_bytes), num_nodes=2)
    assert 0 < metrics.layer_crossings < 1
    assert json.loads(json.dumps(metrics.to_dict()))["distinct_destinations"] == metrics.distinct_destinations


@pytest.mark.parametrize("speed", [0.0, -1.0, np.nan, np.inf])
def test_devices_without_a_speed_are_refused(speed) -> None:
    with pytest.raises(ValueError, match="device_speeds are finite and above 0"):
        evaluate(REPLICATED, TRACE, COST, device_speeds=[1, speed, 1, 1])


def test_comparison_is_made_on_one_half_and_judged_on_the_other() -> None:
    trace = synthetic_trace(
        num_experts=16, experts_per_token=3, num_layers=2, num_windows=4, tokens_per_window=400, drift=0
    )
    past, future = trace.halves()
    result = compare(trace, 4, COST, num_slots=24, bound=True, before=[ExpertPlacement.linear(16, 4)] * 2)
    assert result.placements["eplb"] == STRATEGIES["eplb"](PlacementTask.from_trace(past, 4, num_slots=24))
    assert result.metrics["eplb"].step_seconds == evaluate(result.placements["eplb"], future, COST).step_seconds
    assert result.skipped["weighted"] == "places as eplb_uneven does"
    assert result.best("vllm_balancedness") in ("eplb", "eplb_uneven")
    levelled, gathered = (result.metrics[name].distinct_destinations for name in ("eplb_uneven", "affinity"))
    assert gathered < levelled
    for name, bound in result.replica_bound.items():
        assert 1 - 1e-9 <= bound <= result.metrics[name].max_over_mean + 1e-9
    table = result.to_table().splitlines()
    assert len(table) == 1 + len(result.metrics)
    assert table[0].split()[:3] == ["strategy", "step", "ms"]
    assert (
        json.loads(json.dumps(result.to_dict()))["strategies"]["linear"]["replica_bound"]
        == result.replica_bound["linear"]
    )


def test_comparison_of_counts_leaves_out_what_they_do_not_tell() -> None:
    counts = RoutingTrace(counts=TRACE.counts)
    given_ = {"mine": [ExpertPlacement.round_robin(16, 4)] * 2}
    result = compare(counts, 4, COST, given=given_)
    assert "token-level" in result.skipped["affinity"]
    assert result.skipped["round_robin"] == "places as mine does"
    assert "dest/token" not in result.to_table()
    with pytest.raises(ValueError, match="no distinct_destinations: it needs a trace with token-level ids"):
        result.best("distinct_destinations")
    with pytest.raises(ValueError, match="strategies are ranked by step_seconds"):
        result.best("beauty")
    with pytest.raises(ValueError, match="'affinity' is made from"):
        compare(counts, 4, COST, strategies=["affinity"])
