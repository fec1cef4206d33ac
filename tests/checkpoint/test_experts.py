"""Which expert layout a layer uses is decided by the names that are there, layer by layer."""

import numpy as np
import pytest

from jaxmoe.checkpoint import CheckpointError, expert_blocks, find_expert_layout
from tests.checkpoint.cases import NAMES, Case, add_experts
from tests.conftest import mesh_of


def names_of(layer: int, experts=range(11), fused=False) -> set[str]:
    names = NAMES.for_layer(layer)
    return set(names.fused) if fused else {name for expert in experts for name in names.per_expert(expert)}


def test_each_layer_is_asked_on_its_own():
    tensors = names_of(0) | names_of(1, fused=True)
    assert find_expert_layout(NAMES.for_layer(0), tensors, 11) == "per_expert"
    assert find_expert_layout(NAMES.for_layer(1), tensors, 11) == "fused"


def test_layer_1_is_not_layer_10():
    with pytest.raises(CheckpointError, match="the checkpoint has neither"):
        find_expert_layout(NAMES.for_layer(1), names_of(10), 11)


@pytest.mark.parametrize("experts", [range(11), [7]])
def test_both_layouts_in_one_layer_are_refused(experts):
    with pytest.raises(CheckpointError, match=r"both '.*gate_up_proj' and '.*experts\.\d+\.gate_proj.weight' are"):
        find_expert_layout(NAMES.for_layer(3), names_of(3, experts) | names_of(3, fused=True), 11)


def test_neither_layout_is_refused():
    with pytest.raises(CheckpointError, match=r"as '.*layers\.3.*gate_up_proj' or as '.*layers\.3.*\.0\.gate_proj"):
        find_expert_layout(NAMES.for_layer(3), {"lm_head.weight"}, 11)


def test_slots_name_their_experts():
    case = Case()
    slots = [10, -1, 2, 10]
    add_experts(case, mesh_of(1, 2, 4), np.random.default_rng(0), slots, 11, "per_expert")
    filled = {(block.param, block.param_start): block.tensor for block in case.blocks}
    for slot, expert in enumerate(slots):
        gate, up, down = NAMES.for_layer(0).per_expert(expert) if expert >= 0 else (None,) * 3
        assert filled["layers.0.moe.w_gate_up", (slot, 0, 0, 0)] == gate
        assert filled.get(("layers.0.moe.w_gate_up", (slot, 1, 0, 0))) == up
        assert filled["layers.0.moe.w_down", (slot, 0, 0)] == down


def test_stacks_that_do_not_belong_together_are_a_bug():
    case = Case()
    add_experts(case, mesh_of(1, 2, 4), np.random.default_rng(0), range(4), 4, "fused")
    add_experts(case, mesh_of(1, 2, 4), np.random.default_rng(0), [1, 0, 2, 3], 4, "fused", layer=1)
    with pytest.raises(AssertionError, match="hold different experts"):
        expert_blocks(case.specs[0], case.specs[3], NAMES.for_layer(0), case.tensors)
