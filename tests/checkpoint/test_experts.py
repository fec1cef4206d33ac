"""Which expert layout a layer uses is decided by the names that are there, layer by layer."""

import numpy as np
import pytest

from jaxmoe.checkpoint import (
    CheckpointError,
    expert_blocks,
    find_expert_layout,
    load_arrays,
    make_load_plan,
    open_checkpoint,
)
from jaxmoe.checkpoint.mapping.layouts import PATTERNS
from jaxmoe.models import ExpertTensors
from tests.support.loading import F32, MLP_EXPERTS, Case, add_experts, check_arrays, random, spec, take_rows
from tests.support.meshes import mesh_of
from tests.support.writing import write_checkpoint


def names_of(layer: int, experts=range(11), fused=False) -> set[str]:
    names = MLP_EXPERTS.for_layer(layer)
    return set(names.fused) if fused else {name for expert in experts for name in names.per_expert(expert)}


def test_each_layer_is_asked_on_its_own():
    tensors = names_of(0) | names_of(1, fused=True)
    assert find_expert_layout(MLP_EXPERTS.for_layer(0), tensors, 11) == "per_expert"
    assert find_expert_layout(MLP_EXPERTS.for_layer(1), tensors, 11) == "fused"


def test_layer_1_is_not_layer_10():
    with pytest.raises(CheckpointError, match="the checkpoint has neither"):
        find_expert_layout(MLP_EXPERTS.for_layer(1), names_of(10), 11)


@pytest.mark.parametrize("experts", [range(11), [7]])
def test_both_layouts_in_one_layer_are_refused(experts):
    with pytest.raises(
        CheckpointError, match=r"'.*gate_up_proj' \(fused\) and '.*\.\d+\.gate_proj.weight' \(per_expert\)"
    ):
        find_expert_layout(MLP_EXPERTS.for_layer(3), names_of(3, experts) | names_of(3, fused=True), 11)


def test_neither_layout_is_refused():
    with pytest.raises(CheckpointError, match=r"as '.*layers\.3.*gate_up_proj' or as '.*layers\.3.*\.0\.gate_proj"):
        find_expert_layout(MLP_EXPERTS.for_layer(3), {"lm_head.weight"}, 11)


def test_slots_name_their_experts():
    case = Case()
    slots = [10, -1, 2, 10]
    add_experts(case, mesh_of(1, 2, 4), np.random.default_rng(0), slots, 11, "per_expert")
    filled = {(block.param, block.param_start): block.tensor for block in case.blocks}
    for slot, expert in enumerate(slots):
        gate, up, down = MLP_EXPERTS.for_layer(0).per_expert(expert) if expert >= 0 else (None,) * 3
        assert filled["layers.0.moe.w_gate_up", (slot, 0, 0, 0)] == gate
        assert filled.get(("layers.0.moe.w_gate_up", (slot, 1, 0, 0))) == up
        assert filled["layers.0.moe.w_down", (slot, 0, 0)] == down


def test_stacks_that_do_not_belong_together_are_a_bug():
    case = Case()
    add_experts(case, mesh_of(1, 2, 4), np.random.default_rng(0), range(4), 4, "fused")
    add_experts(case, mesh_of(1, 2, 4), np.random.default_rng(0), [1, 0, 2, 3], 4, "fused", layer=1)
    with pytest.raises(AssertionError, match="hold different experts"):
        expert_blocks(case.specs[0], case.specs[3], MLP_EXPERTS.for_layer(0), case.tensors)


def on_disk(layout: str, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of a layout, from gate and up [E, F, D] and down [E, D, F], written out."""
    turned = {name: value.swapaxes(1, 2) for name, value in {"gate": gate, "up": up, "down": down}.items()}
    model = gate.shape[2]
    return {
        "fused": {"gate_up": np.concatenate([gate, up], axis=1), "down": down},
        "fused_transposed": {
            "gate_up": np.concatenate([turned["gate"], turned["up"]], axis=2), "down": turned["down"]
        },
        "fused_interleaved": {
            "gate_up": np.stack([turned["gate"], turned["up"]], axis=3).reshape(len(gate), model, -1),
            "down": turned["down"],
            "gate_up_bias": np.stack([gate[..., 0], up[..., 0]], axis=2).reshape(len(gate), -1),
            "down_bias": down[..., 0],
        },
        "stacked": {"gate": gate, "up": up, "down": down},
        "stacked_rows": {
            "gate": gate.reshape(-1, model), "up": up.reshape(-1, model), "down": turned["down"].reshape(-1, model)
        },
    }[layout]  # fmt: skip


@pytest.mark.parametrize("staging", [False, True])
@pytest.mark.parametrize("widths", [(8, 6), (8, 4), (4, 4), (1, 2)], ids=str)
@pytest.mark.parametrize("layout", [layout for layout in PATTERNS if not layout.startswith("per_expert")])
def test_every_fused_layout_fills_the_same_stacks(layout, widths, staging, tmp_path):
    """Also where the shapes alone could not tell: 2F = D and F = D."""
    (model, width), mesh, rng = widths, mesh_of(2, 2, 2), np.random.default_rng(0)
    slots = [3, 0, -1, 4, 1, 2, 0, 4]
    gate, up = (random(rng, (5, width, model), F32) for _ in range(2))
    down = random(rng, (5, model, width), F32)
    tensors = on_disk(layout, gate, up, down)
    names = ExpertTensors(**{f"fused_{name}": name for name in tensors}, fused_layout=layout)
    rows = {"rows": tuple(slots), "source_groups": 5}
    specs = {
        "w_gate_up": spec(mesh, "w_gate_up", (8, 2, width, model), ("ep", None, "tp", None), **rows),
        "w_down": spec(mesh, "w_down", (8, model, width), ("ep", None, "tp"), **rows),
        "b_gate_up": spec(mesh, "b_gate_up", (8, 2, width), ("ep", None, "tp"), **rows),
        "b_down": spec(mesh, "b_down", (8, model), ("ep",), **rows),
    }
    if "down_bias" not in tensors:
        specs = {name: specs[name] for name in ("w_gate_up", "w_down")}
    blocks = expert_blocks(
        specs["w_gate_up"], specs["w_down"], names, tensors,
        gate_up_bias=specs.get("b_gate_up"), down_bias=specs.get("b_down"),
    )  # fmt: skip
    stacks = {
        "w_gate_up": np.stack([gate, up], axis=1),
        "w_down": down,
        "b_gate_up": np.stack([gate, up], axis=1)[..., 0],
        "b_down": down[..., 0],
    }
    expected = {name: take_rows(stacks[name], slots, 5) for name in specs}
    case = Case(tensors, list(specs.values()), blocks, expected)
    plan = make_load_plan(open_checkpoint(write_checkpoint(tmp_path, tensors)), case.specs, blocks)
    arrays, report = load_arrays(plan, staging=staging)
    check_arrays(case, arrays)
    assert report.bytes_read == report.bytes_needed == sum(tensor.nbytes for tensor in tensors.values())


def test_experts_without_a_gate(tmp_path):
    mesh, rng = mesh_of(1, 2, 4), np.random.default_rng(0)
    up, down = random(rng, (4, 6, 8), F32), random(rng, (4, 8, 6), F32)
    names = ExpertTensors(fused_up="up", fused_down="down", fused_layout="stacked")
    rows = {"rows": (2, 0, 3, 1), "source_groups": 4}
    case = Case({"up": up, "down": down})
    case.specs = [
        spec(mesh, "w_gate_up", (4, 1, 6, 8), ("ep", None, "tp", None), **rows),
        spec(mesh, "w_down", (4, 8, 6), ("ep", None, "tp"), **rows),
    ]
    case.blocks = expert_blocks(*case.specs, names, case.tensors)
    case.expected = {"w_gate_up": up[[2, 0, 3, 1], None], "w_down": down[[2, 0, 3, 1]]}
    plan = make_load_plan(open_checkpoint(write_checkpoint(tmp_path, case.tensors)), case.specs, case.blocks)
    check_arrays(case, load_arrays(plan)[0])


def test_a_family_with_one_form_is_told_its_own_names():
    names = ExpertTensors(fused_gate_up="mlp.gate_up_proj", fused_down="mlp.down_proj")
    with pytest.raises(CheckpointError, match=r"as 'mlp.gate_up_proj' and so on; the checkpoint has none"):
        find_expert_layout(names, {"lm_head.weight"}, 4)
