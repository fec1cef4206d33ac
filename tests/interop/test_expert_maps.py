"""The tables of vLLM's fused-MoE layer: its published cases, and agreement with `ExpertPlacement`."""

import numpy as np
import pytest

from jaxmoe.interop.expert_maps import (
    determine_expert_map,
    determine_expert_placement_strategy,
    expert_map,
    expert_mask,
    initial_physical_to_logical,
    round_robin_routing_tables,
)
from jaxmoe.placement.base import ExpertPlacement

STRATEGIES = ("linear", "round_robin")
SIZES = [(2, 4), (2, 8), (2, 9), (2, 16), (2, 17), (4, 8), (4, 16), (4, 18), (4, 32), (4, 33), (4, 10), (8, 60), (3, 1)]


def table(experts: int, owned: list[int]) -> list[int]:
    return [owned.index(expert) if expert in owned else -1 for expert in range(experts)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("ep", "experts"), SIZES)
def test_expert_map(strategy: str, ep: int, experts: int) -> None:
    base, remainder = divmod(experts, ep)
    for rank in range(ep):
        local = determine_expert_map(experts, ep, rank, strategy)
        assert local.num_local == base + (rank < remainder)
        start = rank * base + min(rank, remainder)
        owned = {
            "linear": list(range(start, start + local.num_local)),
            "round_robin": list(range(rank, experts, ep)),
        }[strategy]
        np.testing.assert_array_equal(local.expert_map, np.array(table(experts, owned), np.int32), strict=True)


@pytest.mark.parametrize(
    ("strategy", "experts", "ep", "owned"),
    [
        ("linear", 10, 4, [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]),
        ("round_robin", 10, 4, [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]),
        ("linear", 9, 2, [[0, 1, 2, 3, 4], [5, 6, 7, 8]]),
        ("round_robin", 9, 2, [[0, 2, 4, 6, 8], [1, 3, 5, 7]]),
        ("round_robin", 8, 2, [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("round_robin", 8, 4, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("linear", 3, 4, [[0], [1], [2], []]),
        ("round_robin", 3, 4, [[0], [1], [2], []]),
        # More ranks than experts by more than one: vLLM's own function raises for the last ranks.
        ("round_robin", 2, 5, [[0], [1], [], [], []]),
        ("linear", 2, 5, [[0], [1], [], [], []]),
    ],
)
def test_published_expert_maps(strategy: str, experts: int, ep: int, owned: list[list[int]]) -> None:
    for rank, experts_of_rank in enumerate(owned):
        local = determine_expert_map(experts, ep, rank, strategy)
        assert local.num_local == len(experts_of_rank)
        assert local.expert_map is not None
        assert local.expert_map.tolist() == table(experts, experts_of_rank)


def test_local_counts_of_18_over_4() -> None:
    for strategy in STRATEGIES:
        assert [determine_expert_map(18, 4, rank, strategy).num_local for rank in range(4)] == [5, 5, 4, 4]


def test_one_rank_needs_no_map() -> None:
    for strategy in STRATEGIES:
        assert determine_expert_map(8, 1, 0, strategy) == (8, None)


def test_mask_with_a_shared_expert() -> None:
    local = determine_expert_map(10, 4, 1, num_fused_shared_experts=1)
    assert local.expert_map is not None
    assert local.expert_map.tolist() == [-1, -1, -1, 0, 1, 2, -1, -1, -1, -1, 3]
    mask = expert_mask(local.expert_map)
    assert (mask.tolist(), mask.dtype) == ([0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0], np.int32)


def test_128_experts_over_two_ranks() -> None:
    for rank in range(2):
        local = determine_expert_map(128, 2, rank)
        assert np.flatnonzero(local.expert_map >= 0).tolist() == list(range(64 * rank, 64 * rank + 64))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="strategies with an expert map are linear, round_robin; got 'random'"):
        determine_expert_map(8, 2, 0, "random")
    for ep, rank in [(0, 0), (-1, 0), (2, 2), (2, -1)]:
        with pytest.raises(ValueError, match=f"got rank {rank} of ep={ep}"):
            determine_expert_map(8, ep, rank)
    with pytest.raises(ValueError, match="got rank 4 of ep=4"):
        round_robin_routing_tables(8, 4, 4)
    with pytest.raises(ValueError, match="got rank 2 of ep=2"):
        expert_map(ExpertPlacement.linear(8, 2), 2)
    with pytest.raises(ValueError, match="got 'random'"):
        determine_expert_placement_strategy("random", ep=2, num_expert_groups=4)
    for sizes in [(0, 1), (4, -1)]:
        with pytest.raises(ValueError, match=f"got {sizes[0]} and {sizes[1]}"):
            initial_physical_to_logical(*sizes)


@pytest.mark.parametrize("seed", range(5))
def test_map_of_any_placement(seed: int) -> None:
    """Replicas and padding anywhere: the map of a rank points at a slot with that expert, the first one."""
    rng = np.random.default_rng(seed)
    slots = np.concatenate([np.arange(7), rng.integers(-1, 7, 9)])
    placement = ExpertPlacement(7, 4, rng.permutation(slots))
    for rank in range(4):
        local = placement.slot_to_expert.reshape(4, -1)[rank].tolist()
        assert expert_map(placement, rank).tolist() == table(7, local)


@pytest.mark.parametrize(
    ("experts", "ep", "global_to_physical"),
    [
        (10, 4, [0, 3, 6, 8, 1, 4, 7, 9, 2, 5]),
        (8, 2, [0, 4, 1, 5, 2, 6, 3, 7]),
        (9, 2, [0, 5, 1, 6, 2, 7, 3, 8, 4]),
        (8, 4, [0, 2, 4, 6, 1, 3, 5, 7]),
        (18, 4, [0, 5, 10, 14, 1, 6, 11, 15, 2, 7, 12, 16, 3, 8, 13, 17, 4, 9]),
    ],
)
def test_published_routing_tables(experts: int, ep: int, global_to_physical: list[int]) -> None:
    assert round_robin_routing_tables(experts, ep, 0).global_to_physical.tolist() == global_to_physical
    inverse = {(10, 4): [0, 4, 8, 1, 5, 9, 2, 6, 3, 7], (9, 2): [0, 2, 4, 6, 8, 1, 3, 5, 7]}.get((experts, ep))
    if inverse:
        assert round_robin_routing_tables(experts, ep, 0).physical_to_global.tolist() == inverse


@pytest.mark.parametrize(("ep", "experts"), SIZES)
def test_routing_tables(ep: int, experts: int) -> None:
    base, remainder = divmod(experts, ep)
    for rank in range(ep):
        tables = round_robin_routing_tables(experts, ep, rank)
        for expert in range(experts):
            owner, slot = expert % ep, expert // ep
            assert tables.global_to_physical[expert] == owner * base + min(owner, remainder) + slot
        assert tables.physical_to_global[tables.global_to_physical].tolist() == list(range(experts))
        assert tables.local_to_global.tolist() == list(range(rank, experts, ep))
        assert {array.dtype for array in tables} == {np.dtype(np.int32)}


def test_initial_physical_to_logical() -> None:
    assert initial_physical_to_logical(8, 3).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    assert initial_physical_to_logical(3).tolist() == [0, 1, 2]
    assert initial_physical_to_logical(3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]  # wraps more than once
    assert initial_physical_to_logical(8, 3).dtype == np.int32


def test_initial_map_is_a_placement() -> None:
    placement = ExpertPlacement(16, 4, initial_physical_to_logical(16, 4))
    assert placement.expert_to_slots[1].tolist() == [1, 17]
    assert placement.expert_to_slots[10].tolist() == [10, -1]
    assert expert_map(placement, 3).tolist() == [1, 2, 3, 4] + [-1] * 11 + [0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"num_expert_groups": None}, r"no expert groups \(num_expert_groups=None\)"),
        ({"num_expert_groups": 1}, r"no expert groups \(num_expert_groups=1\)"),
        ({"num_redundant_experts": 2}, "2 redundant experts"),
        ({"load_balancing": True}, "load balancer"),
        ({"exchange_supports_round_robin": False}, "cannot translate"),
    ],
)
def test_placement_strategy(changes: dict, reason: str | None) -> None:
    situation = {"ep": 4, "num_expert_groups": 8} | changes
    assert determine_expert_placement_strategy("linear", **situation) == "linear"
    assert determine_expert_placement_strategy("round_robin", **(situation | {"ep": 1})) == "linear"
    if reason is None:
        assert determine_expert_placement_strategy("round_robin", **situation) == "round_robin"
    else:
        with pytest.warns(UserWarning, match=f"falls back to linear: .*{reason}"):
            assert determine_expert_placement_strategy("round_robin", **situation) == "linear"
