"""The tables of vLLM and SGLang: vLLM's published cases, and agreement with `ExpertPlacement`."""

import json

import numpy as np
import pytest

from jaxmoe.interop import (
    expert_location_json,
    expert_map,
    initial_physical_to_logical,
    physical_to_logical_map,
    placements_from_expert_location,
)
from jaxmoe.placement import ExpertPlacement

STRATEGIES = {"linear": ExpertPlacement.linear, "round_robin": ExpertPlacement.round_robin}
SIZES = [(2, 4), (2, 8), (2, 9), (2, 16), (2, 17), (4, 8), (4, 16), (4, 18), (4, 32), (4, 33), (4, 10), (8, 60), (3, 1)]


def table(experts: int, owned: list[int]) -> list[int]:
    return [owned.index(expert) if expert in owned else -1 for expert in range(experts)]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("ep", "experts"), SIZES)
def test_expert_map(strategy: str, ep: int, experts: int) -> None:
    base, remainder = divmod(experts, ep)
    placement = STRATEGIES[strategy](experts, ep)
    for rank in range(ep):
        start, count = rank * base + min(rank, remainder), base + (rank < remainder)
        owned = {"linear": list(range(start, start + count)), "round_robin": list(range(rank, experts, ep))}[strategy]
        assert len(owned) == count
        np.testing.assert_array_equal(
            expert_map(placement, rank), np.array(table(experts, owned), np.int32), strict=True
        )


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
    placement = STRATEGIES[strategy](experts, ep)
    assert [expert_map(placement, rank).tolist() for rank in range(ep)] == [table(experts, one) for one in owned]


@pytest.mark.parametrize("seed", range(5))
def test_map_of_any_placement(seed: int) -> None:
    """Replicas and padding anywhere: the map of a rank points at a slot with that expert, the first one."""
    rng = np.random.default_rng(seed)
    slots = np.concatenate([np.arange(7), rng.integers(-1, 7, 9)])
    placement = ExpertPlacement(7, 4, rng.permutation(slots))
    for rank in range(4):
        local = placement.slot_to_expert.reshape(4, -1)[rank].tolist()
        assert expert_map(placement, rank).tolist() == table(7, local)


def test_initial_physical_to_logical() -> None:
    assert initial_physical_to_logical(8, 3).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2]
    assert initial_physical_to_logical(3).tolist() == [0, 1, 2]
    assert initial_physical_to_logical(3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]  # wraps more than once
    assert initial_physical_to_logical(8, 3).dtype == np.int32


def test_initial_map_is_a_placement() -> None:
    placement = ExpertPlacement(16, 4, initial_physical_to_logical(16, 4))
    assert placement == ExpertPlacement.linear(16, 4, num_slots=20)
    assert expert_map(placement, 3).tolist() == [1, 2, 3, 4] + [-1] * 11 + [0]


def test_an_expert_location_there_and_back() -> None:
    """A model of five layers with experts in the second and the last: SGLang has a row for each of the five."""
    placements = [ExpertPlacement.linear(6, 4, num_slots=8), ExpertPlacement.round_robin(6, 4, num_slots=8)]
    np.testing.assert_array_equal(
        physical_to_logical_map(placements),
        np.array([[0, 1, 2, 3, 4, 5, 0, 1], [0, 4, 1, 5, 2, 0, 3, 1]], np.int32),
        strict=True,
    )
    text = expert_location_json(placements, moe_layers=[1, 4], num_layers=5)
    rows = json.loads(text)["physical_to_logical_map"]
    initial = [0, 1, 2, 3, 4, 5, 0, 1]
    assert rows == [initial, initial, initial, initial, placements[1].slot_to_expert.tolist()]
    assert placements_from_expert_location(text, ep=4, num_experts=6, moe_layers=[1, 4]) == placements
    assert placements_from_expert_location(text, ep=4, num_experts=6) == [placements[0]] * 4 + [placements[1]]


def test_refusals() -> None:
    whole, padded = ExpertPlacement.linear(8, 4), ExpertPlacement.linear(6, 4)
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"got rank {rank} of ep=4"):
            expert_map(whole, rank)
    for sizes in [(0, 1), (4, -1)]:
        with pytest.raises(ValueError, match=f"got {sizes[0]} and {sizes[1]}"):
            initial_physical_to_logical(*sizes)
    with pytest.raises(ValueError, match=r"of 8 slots of MoE layer 1, 2 are padding; place with num_slots=8"):
        physical_to_logical_map([whole, padded])
    with pytest.raises(ValueError, match=r"equally many physical experts; got \[8, 12\]"):
        physical_to_logical_map([whole, ExpertPlacement.linear(8, 4, num_slots=12)])
    with pytest.raises(ValueError, match="the model has 2 MoE layers; got placements of 1"):
        expert_location_json([whole], moe_layers=[0, 1], num_layers=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "an expert location is a JSON object with physical_to_logical_map: "),
        ("[]", "a row for each layer; this one is not"),
        ('{"logical_count": [[1, 2]]}', "a row for each layer; this one is not"),
        ('{"physical_to_logical_map": []}', "a row for each layer; this one is not"),
        ('{"physical_to_logical_map": [[0, 1]]}', "got 1 rows and MoE layer 1"),
        ('{"physical_to_logical_map": [[0, 1], [0, 1, 1]]}', r"shape \(3,\), which does not split over ep=2"),
        ('{"physical_to_logical_map": [[0, 1], [0, 0]]}', "every expert needs a slot: 1 of 2 have none"),
        ('{"physical_to_logical_map": [[0, 1], 5]}', "every device owns the same number of slots"),
        ('{"physical_to_logical_map": [[0, 1], ["a", "b"]]}', "slot_to_expert is a list of "),
    ],
)
def test_a_text_that_is_no_expert_location(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        placements_from_expert_location(text, ep=2, num_experts=2, moe_layers=[1])
