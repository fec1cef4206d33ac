"""One body over every strategy, and what sets each apart."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.placement import STRATEGIES, ExpertPlacement, PlacementTask, RoutingTrace, Strategy, get_strategy
from jaxmoe.placement.affinity import affinity
from jaxmoe.placement.eplb_uneven import eplb_uneven
from jaxmoe.placement.metrics import layer_crossings
from jaxmoe.placement.packing import balanced_packing, replicate_experts
from jaxmoe.placement.swaps import gather_by_swaps
from jaxmoe.placement.synthetic import synthetic_trace
from jaxmoe.placement.traffic import device_loads, route_trace
from jaxmoe.placement.weighted import weighted

pytestmark = pytest.mark.covering

RULES = sorted(name for name, strategy in STRATEGIES.items() if strategy.needs != "map")
DISTINCT = ("eplb_uneven", "affinity", "layer_affinity", "weighted")


def max_over_mean(placement: ExpertPlacement, counts: np.ndarray) -> float:
    loads = device_loads(counts[None], [placement])[0]
    return loads.max() / loads.mean()


def trace_of(num_experts: int, experts_per_token: int, seed: int = 0, **sizes: int) -> RoutingTrace:
    sizes = {"num_layers": 3, "num_windows": 2, "tokens_per_window": 96} | sizes
    return synthetic_trace(num_experts=num_experts, experts_per_token=experts_per_token, seed=seed, **sizes)


# --- laws of every strategy


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("num_experts", "experts_per_token", "ep", "num_slots"),
    [(16, 2, 4, None), (16, 2, 4, 24), (16, 1, 1, None), (8, 8, 8, 16), (6, 2, 6, None), (12, 3, 4, 48)],
)
def test_every_strategy_places_every_expert(name, num_experts, experts_per_token, ep, num_slots) -> None:
    trace = trace_of(num_experts, experts_per_token)
    task = PlacementTask.from_trace(trace, ep, num_slots=num_slots)
    placements = STRATEGIES[name](task)
    assert len(placements) == trace.num_layers
    for placement, counts in zip(placements, trace.total_counts, strict=True):
        assert (placement.num_experts, placement.ep) == (num_experts, ep)
        assert placement.num_slots - placement.num_padding == (num_slots or num_experts)
        assert device_loads(counts[None], [placement]).sum() == pytest.approx(counts.sum())
        if name in DISTINCT:
            assert placement.device_replicas.max() == 1


@pytest.mark.parametrize("name", RULES)
def test_equal_tasks_give_equal_placements(name) -> None:
    first, second = (STRATEGIES[name](PlacementTask.from_trace(trace_of(16, 2), 4, num_slots=20)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("name", [name for name in RULES if not name.startswith("eplb_global") and name != "eplb"])
def test_uneven_shares_are_padded(name) -> None:
    task = PlacementTask.from_trace(trace_of(10, 2), 4)
    for placement in STRATEGIES[name](task):
        assert (placement.slots_per_device, placement.num_padding) == (3, 2)


@pytest.mark.parametrize("name", RULES)
def test_too_few_slots_are_refused(name) -> None:
    with pytest.raises(ValueError, match="every expert needs a slot"):
        STRATEGIES[name](PlacementTask.from_trace(trace_of(16, 2), 4, num_slots=12))


def test_what_a_strategy_needs_is_asked_for() -> None:
    sizes = PlacementTask(num_experts=4, ep=2)
    counts_only = PlacementTask.from_trace(RoutingTrace(counts=np.ones((1, 1, 4), np.int64)), 2)
    assert {name for name in STRATEGIES if STRATEGIES[name].can_place(sizes)} == {"linear", "round_robin"}
    assert not STRATEGIES["affinity"].can_place(counts_only)
    with pytest.raises(ValueError, match="'eplb' is made from expert counts"):
        STRATEGIES["eplb"](sizes)
    with pytest.raises(ValueError, match="'affinity' is made from a routing trace with token-level"):
        STRATEGIES["affinity"](counts_only)
    with pytest.raises(ValueError, match="'explicit' is made from the experts of each device"):
        STRATEGIES["explicit"](sizes)
    with pytest.raises(ValueError, match="placement strategies are .*; got 'best'"):
        get_strategy("best")


def test_a_new_strategy_is_one_entry(monkeypatch) -> None:
    def busiest_alone(task):
        order = np.argsort(-task.counts[0])
        return [ExpertPlacement.from_device_experts(task.num_experts, [order[:1], order[1:]])] * task.num_layers

    monkeypatch.setitem(STRATEGIES, "busiest_alone", Strategy("busiest_alone", "counts", busiest_alone))
    task = PlacementTask(num_experts=3, ep=2, counts=np.array([[1, 5, 2]]))
    assert get_strategy("busiest_alone")(task)[0].slot_to_expert.tolist() == [1, -1, 2, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ep": 0}, "ep is a whole number of at least 1; got 0"),
        ({"num_nodes": 3}, "4 devices are no multiple of num_nodes=3"),
        ({"counts": np.ones(5)}, "counts are of 4 experts; got 5"),
        ({"counts": np.array([1.0, np.nan, 1, 1])}, "finite"),
        ({"counts": np.array([1, -1, 1, 1])}, "at least 0"),
        ({"device_speeds": [1, 1]}, "one entry for each of 4 devices"),
        ({"device_speeds": [1, 0, 1, 1]}, r"finite and above 0; got \[1.0, 0.0"),
        ({"device_speeds": [1, np.nan, 1, 1]}, "finite and above 0"),
        ({"device_slots": [2, -1, 2, 2]}, r"integers, at least 0; got \[2, -1"),
        ({"device_slots": [1.5, 1, 1, 1]}, r"integers, at least 0; got \[1.5"),
        ({"counts": np.ones((2, 4)), "trace": trace_of(4, 1)}, "same layers; got 2 and 3"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        PlacementTask(**({"num_experts": 4, "ep": 4} | fields))


# --- EPLB as published

PUBLISHED = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_published_case() -> None:
    placements = ExpertPlacement.from_counts(PUBLISHED, ep=8, num_slots=16, num_groups=4, num_nodes=2)
    assert [placement.slot_to_expert.tolist() for placement in placements] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert device_loads(PUBLISHED, placements).max(axis=1).tolist() == [156, 179.5]


def test_published_case_global() -> None:
    placements = ExpertPlacement.from_counts(PUBLISHED, ep=8, num_slots=16)
    assert device_loads(PUBLISHED, placements).max(axis=1).tolist() == [138.5, 172]
    # 3 nodes do not divide 4 groups: global, as published.
    grouped = ExpertPlacement.from_counts(PUBLISHED, ep=9, num_slots=18, num_groups=4, num_nodes=3)
    assert grouped == ExpertPlacement.from_counts(PUBLISHED, ep=9, num_slots=18)


def test_counts_of_one_layer_give_one_placement() -> None:
    both = ExpertPlacement.from_counts(PUBLISHED, ep=4)
    assert [ExpertPlacement.from_counts(counts, ep=4) for counts in PUBLISHED] == both
    # 12 experts on 5 devices: 15 slots hold them, and the three to spare are replicas, no padding.
    rounded = ExpertPlacement.from_counts(PUBLISHED[0], ep=5)
    assert (rounded.num_slots, rounded.num_padding) == (15, 0)


def test_hierarchical_keeps_groups_on_their_node() -> None:
    counts = np.random.default_rng(0).integers(1, 1000, (5, 32))
    for placement in ExpertPlacement.from_counts(counts, ep=8, num_slots=40, num_groups=8, num_nodes=4):
        node_of_group = {}
        for device in range(8):
            for expert in placement.device_experts(device):
                assert node_of_group.setdefault(expert // 4, device // 2) == device // 2


def test_slots_that_do_not_split_are_refused() -> None:
    with pytest.raises(ValueError, match="num_slots=15 is no multiple of ep=8; use 16, or the strategy eplb_uneven"):
        ExpertPlacement.from_counts(PUBLISHED, ep=8, num_slots=15)
    with pytest.raises(ValueError, match="num_experts=12 is no multiple of num_groups=8"):
        ExpertPlacement.from_counts(PUBLISHED, ep=8, num_slots=16, num_groups=8, num_nodes=2)
    with pytest.raises(ValueError, match="num_slots=8 is below num_experts=12"):
        ExpertPlacement.from_counts(PUBLISHED, ep=8, num_slots=8)
    with pytest.raises(ValueError, match=r"numbers, \[E\] or \[layers, E\]"):
        ExpertPlacement.from_counts(np.ones((1, 1, 4)), ep=2)
    for size in ("ep", "num_groups", "num_nodes"):
        with pytest.raises(ValueError, match=f"{size} is a whole number of at least 1; got 0"):
            ExpertPlacement.from_counts(PUBLISHED, **{"ep": 8, size: 0})


def packed_one_by_one(weights: np.ndarray, num_packs: int) -> list[int]:
    """Balanced packing in plain Python: the oracle of the vectorised one."""
    loads, items, packs = [np.float32(0)] * num_packs, [0] * num_packs, [0] * weights.size
    for item in sorted(range(weights.size), key=lambda i: -weights[i]):
        pack = min((p for p in range(num_packs) if items[p] < weights.size // num_packs), key=lambda p: loads[p])
        packs[item] = pack
        loads[pack] += weights[item]
        items[pack] += 1
    return packs


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_packing_is_that_of_a_plain_loop(num_packs, per_pack, seed) -> None:
    weights = np.random.default_rng(seed).integers(0, 50, (3, num_packs * per_pack)).astype(np.float32)
    packs, places = balanced_packing(weights, num_packs)
    assert packs.tolist() == [packed_one_by_one(row, num_packs) for row in weights]
    for row_packs, row_places in zip(packs, places, strict=True):
        assert len(set(zip(row_packs.tolist(), row_places.tolist(), strict=True))) == weights.shape[1]


@given(st.integers(1, 8), st.integers(0, 10), st.integers(0, 2**32 - 1))
def test_each_replica_goes_where_the_load_is(num_experts, extra, seed) -> None:
    weights = np.random.default_rng(seed).integers(1, 100, (1, num_experts)).astype(np.float32)
    experts, replicas = replicate_experts(weights, num_experts + extra)
    assert np.bincount(experts[0], minlength=num_experts).tolist() == replicas[0].tolist()
    # No expert with replicas to spare could give one to a busier expert and lower that one's share below its own.
    share = weights[0] / replicas[0]
    spare = replicas[0] > 1
    if spare.any():
        assert share.max() <= (weights[0] / np.maximum(replicas[0] - 1, 1))[spare].min() * (1 + 1e-6)


# --- balance


@settings(max_examples=40)
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_levelling_never_does_worse_than_linear_by_more_than_a_replica(ep, per_device, extra, seed) -> None:
    counts = np.random.default_rng(seed).zipf(1.6, ep * per_device).clip(max=10_000)
    num_slots = ep * min(per_device + extra, counts.size)
    unreplicated = max_over_mean(ExpertPlacement.linear(counts.size, ep), counts)
    for levelled in (
        ExpertPlacement.from_counts(counts, ep=ep, num_slots=num_slots),
        eplb_uneven(counts[None], ep, num_slots=num_slots)[0],
    ):
        # Greedy packing into equal shares ends within one item of the mean; linear may be level by luck.
        heaviest = (counts / levelled.replica_counts).max() / (counts.sum() / ep)
        assert max_over_mean(levelled, counts) <= max(unreplicated, 1 + heaviest) + 1e-6


@pytest.mark.parametrize("num_slots", [64, 70, 72])
def test_levelling_levels_what_it_was_made_from(num_slots) -> None:
    counts = np.random.default_rng(1).lognormal(0, 1, (6, 64)) * 100
    linear = [max_over_mean(ExpertPlacement.linear(64, 8), layer) for layer in counts]
    placements = eplb_uneven(counts, 8, num_slots=num_slots)
    uneven = [max_over_mean(p, c) for p, c in zip(placements, counts, strict=True)]
    for ratio, placement, layer in zip(uneven, placements, counts, strict=True):
        shares = np.sort((layer / placement.replica_counts)[placement.slot_to_expert[placement.slot_to_expert >= 0]])
        # Some device has the heaviest replica and must fill its other slots, at best with the lightest.
        bound = (shares[-1] + shares[: num_slots // 8 - 1].sum()) / shares.sum() * 8
        assert ratio < 1.02 * max(1, bound)
    assert np.mean(uneven) < np.mean(linear)
    if num_slots % 8 == 0:
        even = ExpertPlacement.from_counts(counts, ep=8, num_slots=num_slots)
        published = [max_over_mean(p, c) for p, c in zip(even, counts, strict=True)]
        assert np.mean(uneven) <= np.mean(published) + 1e-9


def test_uneven_takes_any_number_of_slots() -> None:
    counts = np.random.default_rng(2).integers(0, 100, (2, 10))
    for num_slots in range(10, 41):
        for placement in eplb_uneven(counts, 4, num_slots=num_slots):
            sizes = placement.device_replicas.sum(axis=1)
            assert sizes.sum() == num_slots
            assert sizes.max() - sizes.min() <= 1
            assert placement.device_replicas.max() == 1
    with pytest.raises(ValueError, match="num_experts=10 cannot fill the 11 slots of device 0"):
        eplb_uneven(counts, 4, num_slots=41)


def test_spare_slots_of_unused_experts_go_round() -> None:
    (placement,) = eplb_uneven(np.zeros((1, 4)), 4, num_slots=8)
    assert placement.replica_counts.tolist() == [2, 2, 2, 2]


@given(st.lists(st.integers(0, 50), min_size=12, max_size=12), st.integers(12, 30), st.integers(-40, 40))
def test_the_unit_of_loads_does_not_matter(counts, num_slots, exponent) -> None:
    if not any(counts):
        return
    loads = np.array([counts], np.float64)
    # By a power of two, which rounds nothing.
    assert eplb_uneven(loads * 2.0**exponent, 4, num_slots=num_slots) == eplb_uneven(loads, 4, num_slots=num_slots)


def test_weighted_loads_follow_speed_and_memory() -> None:
    counts = np.random.default_rng(3).integers(50, 150, (3, 32))
    speeds = np.array([4.0, 2.0, 1.0, 1.0])
    for placement, layer in zip(
        weighted(counts, 4, device_slots=[16, 10, 6, 4], device_speeds=speeds), counts, strict=True
    ):
        assert (placement.device_replicas.sum(axis=1) <= [16, 10, 6, 4]).all()
        busy = device_loads(layer[None], [placement])[0] / speeds
        assert busy.max() / busy.mean() < 1.1
    with pytest.raises(ValueError, match="above 0"):
        weighted(counts, 4, device_speeds=[1, 1, 0, 1])
    with pytest.raises(ValueError, match="there are 31 slots for num_experts=32"):
        weighted(counts, 4, device_slots=[8, 8, 8, 7])


@settings(max_examples=60)
@given(st.integers(1, 7), st.lists(st.integers(0, 7), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_any_devices_that_hold_the_experts_are_filled(num_experts, slots, seed) -> None:
    slots = np.minimum(slots, num_experts)
    if slots.sum() < num_experts:
        return
    counts = np.random.default_rng(seed).integers(0, 9, (1, num_experts))
    (placement,) = weighted(counts, slots.size, device_slots=slots.tolist())
    held = placement.device_replicas
    assert held.max() == 1
    assert (held.sum(axis=1) <= slots).all()


# --- affinity


def test_affinity_finds_planted_groups() -> None:
    # Experts 0, 3, 6, 9 fire together, and so on: linear placement breaks up every group.
    rng = np.random.default_rng(0)
    groups = np.arange(600) % 3
    ids = groups[:, None] + 3 * np.array([rng.permutation(4)[:2] for _ in groups])
    (placement,) = affinity(ids[:, None], num_experts=12, ep=3)
    assert sorted(sorted(placement.device_experts(device)) for device in range(3)) == [
        [0, 3, 6, 9],
        [1, 4, 7, 10],
        [2, 5, 8, 11],
    ]


@pytest.mark.parametrize("num_slots", [32, 40])
def test_affinity_saves_destinations_within_its_load_limit(num_slots) -> None:
    trace = trace_of(32, 4, num_windows=4, tokens_per_window=256)
    assert trace.expert_ids is not None
    levelled = eplb_uneven(trace.total_counts, 8, num_slots=num_slots)
    gathered = affinity(trace.expert_ids, 32, 8, num_slots=num_slots, load_slack=1.2)
    before, after = (route_trace(trace, placements).distinct_destinations for placements in (levelled, gathered))
    assert after.mean() < 0.93 * before.mean()
    for placement, counts in zip(gathered, trace.total_counts, strict=True):
        assert max_over_mean(placement, counts) < 1.2 + 1e-3


@settings(max_examples=50)
@given(st.integers(2, 4), st.integers(1, 5), st.booleans(), st.integers(0, 2**32 - 1))
def test_swaps_only_gain_and_keep_every_limit(ep, per_device, with_devices, seed) -> None:
    rng = np.random.default_rng(seed)
    N = ep * per_device
    experts = np.concatenate([rng.permutation(per_device * 2)[:per_device] for _ in range(ep)])
    start, weights = np.repeat(np.arange(ep), per_device), rng.integers(1, 10, N).astype(float)
    pairs = rng.integers(0, 20, (N, N))
    pairs = pairs + pairs.T
    fixed = rng.integers(0, 30, (N, ep)) if with_devices else np.zeros((N, ep), int)

    def worth(device_N: np.ndarray) -> int:
        together = device_N[:, None] == device_N
        return int(np.triu(pairs * together, 1).sum() + fixed[np.arange(N), device_N].sum())

    limit = weights.sum() / ep * 1.1
    end = gather_by_swaps(
        start, weights, experts, limit, pair_affinity_NN=pairs, device_affinity_ND=fixed if with_devices else None
    )
    assert worth(end) >= worth(start)
    assert (end == start).all() or worth(end) > worth(start)
    assert np.bincount(end, minlength=ep).tolist() == [per_device] * ep
    loads = [np.bincount(device, weights=weights, minlength=ep) for device in (start, end)]
    assert loads[1].max() <= max(limit, loads[0].max()) + 1e-6
    for device in range(ep):
        assert len(set(experts[end == device])) == per_device


def test_layer_affinity_saves_crossings() -> None:
    trace = trace_of(32, 4, num_windows=4, tokens_per_window=256, num_layers=5)
    task = PlacementTask.from_trace(trace, 8)
    crossings = {
        name: layer_crossings(STRATEGIES[name](task), trace) for name in ("linear", "affinity", "layer_affinity")
    }
    assert crossings["layer_affinity"] < 0.93 * min(crossings["linear"], crossings["affinity"])


# --- published sizes


@pytest.mark.parametrize(("ep", "num_nodes"), [(32, 4), (144, 18)])
def test_a_whole_deepseek_v3_is_placed_in_seconds(ep, num_nodes) -> None:
    counts = np.random.default_rng(0).lognormal(0, 1.2, (58, 256)) * 1000
    task = PlacementTask(num_experts=256, ep=ep, num_slots=288, num_groups=8, num_nodes=num_nodes, counts=counts)
    for name in ("eplb", "eplb_global", "eplb_uneven", "weighted"):
        start = time.thread_time()
        placements = STRATEGIES[name](task)
        assert time.thread_time() - start < 5
        assert len(placements) == 58
        loads = device_loads(counts, placements)
        linear = device_loads(counts, [ExpertPlacement.linear(256, ep)] * 58)
        assert (loads.max(axis=1) < linear.max(axis=1)).all()


@pytest.mark.full
@pytest.mark.parametrize("name", ["affinity", "layer_affinity"])
@pytest.mark.parametrize("ep", [32, 144])
def test_a_whole_deepseek_v3_is_placed_by_affinity(name, ep) -> None:
    trace = trace_of(256, 8, num_layers=58, num_windows=2, tokens_per_window=1024)
    placements = STRATEGIES[name](PlacementTask.from_trace(trace, ep, num_slots=288))
    assert len(placements) == 58
