"""The rows of vLLM's expert mapping: its published cases."""

import numpy as np
import pytest

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.interop.expert_params import (
    ExpertRow,
    activation_scale_mapping,
    assignments,
    expert_params_mapping,
    fused_chunk,
    per_tensor_scale,
    scale_index,
    weight_scale_mapping,
)

E, REDUNDANT = 16, 4
NAMINGS = [("gate_proj", "down_proj", "up_proj"), ("w1", "w2", "w3"), ("linear", "linear_1", "linear_v")]


def found(name: str, rows: list[ExpertRow]) -> list[tuple[str, int, str]]:
    return [(param, row.expert_id, row.shard_id) for param, row in assignments(name, rows)]


def test_rows_of_one_expert() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", 4)
    assert len(rows) == 12
    assert [tuple(row) for row in rows[9:]] == [
        ("experts.w13_", "experts.3.gate_proj.", 3, "w1"),
        ("experts.w2_", "experts.3.down_proj.", 3, "w2"),
        ("experts.w13_", "experts.3.up_proj.", 3, "w3"),
    ]


def test_rows_under_an_adapter() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", 4, base_layer=True)
    assert tuple(rows[9]) == ("experts.base_layer.w13_", "experts.3.gate_proj.base_layer.", 3, "w1")
    assert found("mlp.experts.3.gate_proj.base_layer.weight", rows) == [("mlp.experts.base_layer.w13_weight", 3, "w1")]
    assert found("mlp.experts.3.gate_proj.weight", rows) == []


@pytest.mark.parametrize(
    "suffix", ["weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale", "g_idx", "qweight"]
)
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("base_layer", [False, True])
def test_redundant_experts_are_filled_too(naming: tuple[str, str, str], suffix: str, base_layer: bool) -> None:
    rows = expert_params_mapping(*naming, E, REDUNDANT, base_layer=base_layer)
    wrapped = "base_layer." if base_layer else ""
    stacks = [("w13", "w1"), ("w2", "w2"), ("w13", "w3")]
    for name, (stack, shard) in zip(naming, stacks, strict=True):
        for logical, physical in [(1, [1, 17]), (10, [10]), (0, [0, 16]), (15, [15])]:
            assert found(f"model.layers.7.mlp.experts.{logical}.{name}.{wrapped}{suffix}", rows) == [
                (f"model.layers.7.mlp.experts.{wrapped}{stack}_{suffix}", expert, shard) for expert in physical
            ]


@pytest.mark.parametrize("include_fused", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "experts.01.gate_proj.weight",
        "experts.16.gate_proj.weight",
        "experts.-1.gate_proj.weight",
        "experts.1.gate_proj_extra.weight",
        "experts.1.gate_proj",
        "experts.1.gate.weight",
        "gate.weight",
        "mlp.gate.weight",
        "shared_experts.gate_proj.weight",
        "other_experts.1.gate_proj.weight",
        "experts.gate_up_projection",
        "experts.weight",
        "",
    ],
)
def test_names_of_no_expert(name: str, include_fused: bool) -> None:
    assert found(name, expert_params_mapping("gate_proj", "down_proj", "up_proj", E, include_fused=include_fused)) == []


def test_experts_without_gate() -> None:
    rows = expert_params_mapping(None, "down_proj", "up_proj", E, REDUNDANT, include_fused=True)
    assert [tuple(row) for row in rows[:4]] == [
        ("experts.w13_weight", "experts.up_proj", 0, "w1"),
        ("experts.w2_weight", "experts.down_proj", 0, "w2"),
        ("experts.w13_", "experts.0.up_proj.", 0, "w1"),
        ("experts.w2_", "experts.0.down_proj.", 0, "w2"),
    ]
    assert found("experts.1.up_proj.weight", rows) == [
        ("experts.w13_weight", 1, "w1"),
        ("experts.w13_weight", 17, "w1"),
    ]
    assert found("experts.up_proj", rows) == [("experts.w13_weight", 0, "w1")]
    stack = np.arange(24).reshape(2, 4, 3)
    assert fused_chunk(stack, rows[0], rows) is stack


def test_fused_rows_name_chunks() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", E, REDUNDANT, include_fused=True)
    assert [tuple(row) for row in rows[:3]] == [
        ("experts.w13_weight", "experts.gate_up_proj", 0, "w1"),
        ("experts.w13_weight", "experts.gate_up_proj", 1, "w3"),
        ("experts.w2_weight", "experts.down_proj", 0, "w2"),
    ]
    stack = np.arange(E * 4 * 3).reshape(E, 4, 3)
    gate, up = (fused_chunk(stack, row, rows) for _, row in assignments("mlp.experts.gate_up_proj", rows))
    np.testing.assert_array_equal(gate, stack[:, :2])  # of all experts, before up of any
    np.testing.assert_array_equal(up, stack[:, 2:])
    ((param, down),) = assignments("mlp.experts.down_proj", rows)
    assert param == "mlp.experts.w2_weight"
    assert fused_chunk(stack, down, rows) is stack


@pytest.mark.parametrize(("naming", "both"), [(NAMINGS[0], "gate_up_proj"), (NAMINGS[1], "w13")])
def test_gate_and_up_of_one_expert_in_one(naming: tuple[str, str, str], both: str) -> None:
    rows = expert_params_mapping(*naming, E, REDUNDANT, include_fused=True)
    targets = assignments(f"mlp.experts.1.{both}.weight", rows)
    assert [(param, row.expert_id, row.shard_id) for param, row in targets] == [
        ("mlp.experts.w13_weight", expert, shard) for expert in (1, 17) for shard in ("w1", "w3")
    ]
    matrix = np.arange(12).reshape(4, 3)
    for _, row in targets:
        np.testing.assert_array_equal(
            fused_chunk(matrix, row, rows), matrix[:2] if row.shard_id == "w1" else matrix[2:]
        )


def test_per_expert_and_fused_in_one_mapping() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", E, include_fused=True)
    assert found("a.experts.gate_up_proj", rows) == [
        ("a.experts.w13_weight", 0, "w1"),
        ("a.experts.w13_weight", 1, "w3"),
    ]
    assert found("b.experts.2.up_proj.weight", rows) == [("b.experts.w13_weight", 2, "w3")]
    assert found("a.experts.gate_up_proj_scale_inv", rows)[0] == ("a.experts.w13_weight_scale_inv", 0, "w1")


def test_fused_matching_stops_after_the_first_run() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", 2, include_fused=True)
    assert len(assignments("experts.gate_up_proj", [*rows, rows[0]])) == 2


def test_fused_rows_need_a_known_name() -> None:
    with pytest.raises(
        CheckpointError, match="for gate_proj/up_proj or w1/w3; got linear/linear_v; leave include_fused"
    ):
        expert_params_mapping("linear", "linear_1", "linear_v", 2, include_fused=True)


def test_bad_rows_and_shapes_are_refused() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", 2, include_fused=True)
    with pytest.raises(CheckpointError, match="chunks 0 and 1 of a dim of even size; got chunk 2"):
        fused_chunk(np.zeros((2, 4, 3)), rows[0]._replace(expert_id=2), rows)
    with pytest.raises(CheckpointError, match=r"got chunk 0 of dim 1 of \(2, 5, 3\)"):
        fused_chunk(np.zeros((2, 5, 3)), rows[0], rows)


def test_tensors_without_a_parameter() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", 2, include_fused=True)
    params = {"experts.w13_weight", "experts.w2_weight"}
    assert assignments("experts.1.down_proj.bias", rows, params) == []
    assert len(assignments("experts.1.down_proj.bias", rows, params | {"experts.w2_bias"})) == 1
    with pytest.raises(CheckpointError, match=r"would fill 'experts.w2_new_scale', which the model does not have"):
        assignments("experts.1.down_proj.new_scale", rows, params)
    with pytest.raises(CheckpointError, match=r"'experts.gate_up_proj_bias' would fill"):
        assignments("experts.gate_up_proj_bias", rows, params)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "weight_scale_2"])
def test_weight_scales(scale: str) -> None:
    rows = weight_scale_mapping("gate_proj", "down_proj", "up_proj", E, REDUNDANT, scale=scale)
    general = expert_params_mapping("gate_proj", "down_proj", "up_proj", E, REDUNDANT)
    name = f"mlp.experts.1.up_proj.{scale}"
    assert found(name, rows) == found(name, general) == [(f"mlp.experts.w13_{scale}", e, "w3") for e in (1, 17)]
    for other in {"weight", "weight_scale", "weight_scale_inv", "weight_scale_2", "input_scale"} - {scale}:
        assert found(f"mlp.experts.1.up_proj.{other}", rows) == []


@pytest.mark.parametrize("scale", ["input_scale", "activation_scale"])
def test_activation_scales(scale: str) -> None:
    rows = activation_scale_mapping("w1", "w2", "w3", E, scale=scale)
    assert found(f"experts.15.w2.{scale}", rows) == [(f"experts.w2_{scale}", 15, "w2")]
    assert found("experts.15.w2.weight_scale", rows) == []


def test_unknown_scales() -> None:
    with pytest.raises(CheckpointError, match="input_scale, activation_scale; got 'activation_scale_inv'"):
        activation_scale_mapping("w1", "w2", "w3", E, scale="activation_scale_inv")
    with pytest.raises(CheckpointError, match="weight_scale, weight_scale_inv, weight_scale_2; got 'scale'"):
        weight_scale_mapping("w1", "w2", "w3", E, scale="scale")


def test_per_tensor_scales() -> None:
    for saved in ([0.5], 0.5, [[0.5]]):
        scale = per_tensor_scale(np.array(saved, np.float32))
        assert (scale.shape, float(scale)) == ((), 0.5)
    with pytest.raises(CheckpointError, match=r"one element; this one has shape \(2,\)"):
        per_tensor_scale(np.array([0.1, 0.2]))
    rows = expert_params_mapping("w1", "w2", "w3", 4)
    assert [scale_index(row) for row in rows[9:]] == [(3, 0), (3,), (3, 1)]
