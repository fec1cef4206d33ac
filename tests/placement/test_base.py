"""`ExpertPlacement`, linear, round robin, explicit maps and JSON."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmoe import ExpertPlacement
from jaxmoe.placement import make_placement, make_placements, placements_from_json, placements_to_json
from jaxmoe.placement.explicit import explicit

LINEAR, ROUND_ROBIN = ExpertPlacement.linear, ExpertPlacement.round_robin


def devices(placement: ExpertPlacement) -> list[list[int]]:
    return [placement.device_experts(device) for device in range(placement.ep)]


@pytest.mark.parametrize(
    ("make", "num_experts", "ep", "expected"),
    [
        (LINEAR, 10, 4, [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]),
        (ROUND_ROBIN, 10, 4, [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]),
        (LINEAR, 9, 2, [[0, 1, 2, 3, 4], [5, 6, 7, 8]]),
        (ROUND_ROBIN, 9, 2, [[0, 2, 4, 6, 8], [1, 3, 5, 7]]),
        (LINEAR, 3, 4, [[0], [1], [2], []]),
        (ROUND_ROBIN, 3, 4, [[0], [1], [2], []]),
        (LINEAR, 4, 1, [[0, 1, 2, 3]]),
        (LINEAR, 1, 3, [[0], [], []]),
    ],
)
def test_who_holds_what(make, num_experts, ep, expected) -> None:
    assert devices(make(num_experts, ep)) == expected


@pytest.mark.parametrize("make", [LINEAR, ROUND_ROBIN])
def test_remainder_goes_to_the_lowest_devices(make) -> None:
    placement = make(18, 4)
    assert [len(experts) for experts in devices(placement)] == [5, 5, 4, 4]
    assert (placement.num_slots, placement.slots_per_device, placement.num_padding) == (20, 5, 2)


@pytest.mark.parametrize("make", [LINEAR, ROUND_ROBIN])
@pytest.mark.parametrize("num_slots", [8, 11, 12, 20])
def test_redundant_experts_are_replicas_modulo_e(make, num_slots) -> None:
    placement = make(8, 4, num_slots=num_slots)
    dealt = [e for experts in devices(placement) for e in experts]
    assert sorted(dealt) == sorted(i % 8 for i in range(num_slots))
    sizes = [len(experts) for experts in devices(placement)]
    assert max(sizes) - min(sizes) <= 1


def test_initial_map_of_replicas() -> None:
    assert LINEAR(8, 1, num_slots=11).slot_to_expert.tolist() == [*range(8), 0, 1, 2]


@pytest.mark.parametrize("make", [LINEAR, ROUND_ROBIN])
def test_padding_can_be_refused(make) -> None:
    with pytest.raises(ValueError, match=r"num_experts \(60\) does not fill 8 .* 4 slots would be padding"):
        make(60, 8, allow_padding=False)
    with pytest.raises(ValueError, match="num_slots=7 is below num_experts=8"):
        make(8, 4, num_slots=7)


@pytest.mark.parametrize("make", [LINEAR, ROUND_ROBIN])
def test_no_device_is_refused(make) -> None:
    with pytest.raises(ValueError, match="ep is an integer of at least 1; got 0"):
        make(4, 0)


def test_tables_follow_from_the_slots() -> None:
    placement = ExpertPlacement(num_experts=3, ep=2, slot_to_expert=[2, 0, -1, 1, 2, -1])
    assert placement.replica_counts.tolist() == [1, 1, 2]
    assert placement.expert_to_slots.tolist() == [[1, -1], [3, -1], [0, 4]]
    assert placement.device_replicas.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert devices(placement) == [[2, 0], [1, 2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((2, 2, [0, 1, 0]), "does not split over ep=2; pad it with -1"),
        ((2, 2, [0, 2]), "a slot holds an expert 0..1 or -1"),
        ((2, 2, [0, -2]), "a slot holds an expert 0..1 or -1"),
        ((3, 2, [0, 1]), "1 of 3 have none, the first is 2"),
        ((0, 1, [0]), "num_experts is an integer of at least 1; got 0"),
        ((1, 0, [0]), "ep is an integer of at least 1; got 0"),
        ((1, 1, [[0]]), "has shape"),
        ((2, 2, [0.0, 1.7]), r"integers, each an expert; got float64 \[0.0, 1.7\]"),
        ((2, 2, np.array([2**32, 1])), "integers, each an expert; got int64"),
        ((2, 2, np.array([0, 1 - 2**32])), "integers, each an expert; got int64"),
        ((2, 2, [[0], [1, 0]]), "slot_to_expert is a list of integers"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertPlacement(*fields)


def test_slots_cannot_be_changed() -> None:
    source = np.array([0, 1], np.int32)
    placement = ExpertPlacement(2, 2, source)
    source[0] = 1
    assert placement.slot_to_expert.tolist() == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        placement.slot_to_expert[0] = 1


def test_explicit_map() -> None:
    assert explicit([[2, 0], [1]]).slot_to_expert.tolist() == [2, 0, 1, -1]
    assert explicit([[0], [0]]).replica_counts.tolist() == [2]
    with pytest.raises(ValueError, match="1 of 3 have none"):
        explicit([[2, 0]])
    with pytest.raises(ValueError, match="leave a device's list short"):
        explicit([[0, -1]])
    with pytest.raises(ValueError, match=r"the experts of a device is a list of integers.* got float64 \[1.5\]"):
        explicit([[0], [1.5]])


@st.composite
def placements(draw: st.DrawFn) -> ExpertPlacement:
    """Any placement: every expert somewhere, then replicas and padding, shuffled."""
    num_experts, ep = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    slots = list(range(num_experts)) + draw(st.lists(st.integers(-1, num_experts - 1), max_size=12))
    slots += [-1] * (-len(slots) % ep)
    return ExpertPlacement(num_experts, ep, draw(st.permutations(slots)))


@given(placements())
def test_json_round_trip(placement) -> None:
    assert ExpertPlacement.from_json(placement.to_json()) == placement
    assert placements_from_json(placement.to_json()) == placement
    assert placements_from_json(placements_to_json([placement] * 3)) == [placement] * 3
    assert len({placement, ExpertPlacement.from_json(placement.to_json())}) == 1


@given(placements())
def test_tables_agree(placement) -> None:
    for expert, slots in enumerate(placement.expert_to_slots):
        held = slots[slots >= 0]
        assert held.size == placement.replica_counts[expert]
        assert (placement.slot_to_expert[held] == expert).all()
    assert placement.replica_counts.sum() + placement.num_padding == placement.num_slots
    assert (placement.device_replicas.sum(axis=0) == placement.replica_counts).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "a placement file is JSON"),
        ("best.json", "the text that is in the file, and not its name"),
        ("[1]", '"format": "jaxmoe.expert_placement"'),
        ("{}", '"format": "jaxmoe.expert_placement"'),
        (json.dumps({"format": "jaxmoe.expert_placement", "version": 2}), "version 1 .* got 2; upgrade"),
        (json.dumps({"format": "jaxmoe.expert_placement", "version": 1, "ep": 1}), "num_experts"),
        (LINEAR(2, 2).to_json().replace("[0, 1]", "[0, 1.5]"), "slot_to_expert is a list of integers"),
        (LINEAR(2, 2).to_json().replace('"ep": 2', '"ep": 2.5'), "all integers; got num_experts 2, ep 2.5"),
    ],
)
def test_a_file_that_is_no_placement_is_refused(text, message) -> None:
    with pytest.raises(ValueError, match=message):
        placements_from_json(text)


def test_names_are_resolved() -> None:
    assert make_placement("linear", 4, 2) == LINEAR(4, 2)
    assert make_placement("eplb", 3, 2, counts=np.array([1, 6, 2]), num_slots=4).slot_to_expert.tolist() == [1, 2, 1, 0]
    assert make_placements(["linear", ROUND_ROBIN(6, 2)], [4, 6], 2) == [LINEAR(4, 2), ROUND_ROBIN(6, 2)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eplb", r"made from expert counts.*from_counts\(counts, ep=2\).*jaxmoe place.*pass the result"),
        ("affinity", "made from the expert ids of a routing trace"),
        ("explicit", "made from lists of experts"),
        ("nearest", "placement strategies are affinity, .*; got 'nearest'"),
    ],
)
def test_a_name_that_needs_more_says_what_to_do(name, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_placements(name, [4, 4], 2)


def test_a_placement_for_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="is for 4 experts on 2 devices, but the layer has 4 experts on 4"):
        make_placement(LINEAR(4, 2), 4, 4)
    with pytest.raises(ValueError, match="got 1 for 2 MoE layers"):
        make_placements(["linear"], [4, 4], 2)
    with pytest.raises(TypeError, match="got int"):
        make_placement(3, 4, 2)
    with pytest.raises(TypeError, match=r"placement is a strategy's name, .*ExpertPlacement.*; got ndarray"):
        make_placements(np.arange(4), [4, 4], 2)
