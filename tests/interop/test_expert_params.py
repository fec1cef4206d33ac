"""The rows of vLLM's expert mapping: its published cases, and the tensors of checkpoints."""

from pathlib import Path

import pytest

from jaxmoe.checkpoint import open_checkpoint
from jaxmoe.checkpoint.inspection import group_of
from jaxmoe.interop import ExpertRow, assignments, expert_params_mapping, map_names
from tests.support.saved import SOURCES

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


def test_fused_rows_name_chunks() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", E, REDUNDANT, include_fused=True)
    assert [tuple(row) for row in rows[:3]] == [
        ("experts.w13_weight", "experts.gate_up_proj", 0, "w1"),
        ("experts.w13_weight", "experts.gate_up_proj", 1, "w3"),
        ("experts.w2_weight", "experts.down_proj", 0, "w2"),
    ]
    assert found("mlp.experts.gate_up_proj", rows) == [
        ("mlp.experts.w13_weight", 0, "w1"),
        ("mlp.experts.w13_weight", 1, "w3"),
    ]
    assert found("mlp.experts.down_proj", rows) == [("mlp.experts.w2_weight", 0, "w2")]


@pytest.mark.parametrize(("naming", "both"), [(NAMINGS[0], "gate_up_proj"), (NAMINGS[1], "w13")])
def test_gate_and_up_of_one_expert_in_one(naming: tuple[str, str, str], both: str) -> None:
    rows = expert_params_mapping(*naming, E, REDUNDANT, include_fused=True)
    targets = assignments(f"mlp.experts.1.{both}.weight", rows)
    assert [(param, row.expert_id, row.shard_id) for param, row in targets] == [
        ("mlp.experts.w13_weight", expert, shard) for expert in (1, 17) for shard in ("w1", "w3")
    ]


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
    with pytest.raises(ValueError, match="for gate_proj/up_proj or w1/w3; got linear/linear_v; leave include_fused"):
        expert_params_mapping("linear", "linear_1", "linear_v", 2, include_fused=True)


def test_parts_of_fused_tensors() -> None:
    rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", 2, include_fused=True)
    parts = {
        "": "weight",
        "_bias": "bias",
        "_blocks": "weight",
        "_scales": "weight_scale",
        "_scale_inv": "weight_scale_inv",
    }
    for part, param in parts.items():
        assert found(f"mlp.experts.down_proj{part}", rows) == [(f"mlp.experts.w2_{param}", 0, "w2")]
        assert {param for param, _, _ in found(f"mlp.experts.gate_up_proj{part}", rows)} == {f"mlp.experts.w13_{param}"}


# Experts of these have names that vLLM's mapping has no row for; its models rename them first.
OWN_NAMES = {"dbrx": 6, "granitemoe": 4, "granitemoehybrid": 6, "granitemoeshared": 4}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_expert_tensor_of_a_family_fills_its_part_once(path: Path) -> None:
    names = [name for name in open_checkpoint(path).tensors if group_of(name) == "routed experts"]
    mapped = map_names(open_checkpoint(path).tensors)
    without = [name for name in names if not mapped.get(name)]
    if path.name == "original" and path.parent.name in OWN_NAMES:
        assert without == names
        assert len(names) == OWN_NAMES[path.parent.name]
        return
    assert without == []
    assert mapped.keys() == set(names)
    places = [(param, row.is_fused, row.expert_id, row.shard_id) for found in mapped.values() for param, row in found]
    assert len(places) == len(set(places))
    if path.parent.name == "longcat_flash" and path.name == "original":
        # transformers makes gate and up for zero experts too.
        experts = {place[2] for place in places if place[-1] == "w2"}
        places = [place for place in places if place[2] in experts]
    # Whatever the layout, a layer has w2 for each w1, and as many w3, or none where experts have no gate.
    shards = [[place for place in places if place[-1] == shard] for shard in ("w1", "w2", "w3")]
    assert len(shards[0]) == len(shards[1])
    assert len(shards[2]) in (len(shards[0]), 0)
    assert bool(shards[2]) == (path.parent.name != "nemotron_h")


@pytest.mark.parametrize(
    ("layer", "suffix"),
    [("h.0.mlp.experts", "weight"), ("h.1.mlp.experts", "weight_scale_inv"), ("experts", "qweight")],
)
@pytest.mark.parametrize("naming", [*NAMINGS, (None, "down_proj", "up_proj")])
@pytest.mark.parametrize("wrapped", ["", "base_layer."])
def test_names_tell_how_a_layer_calls_its_projections(naming, wrapped, layer, suffix) -> None:
    names = [f"{layer}.{e}.{part}.{wrapped}{suffix}" for e in range(3) for part in naming if part]
    mapped = map_names([*names, "lm_head.weight", "h.0.mlp.shared_experts.gate_proj.weight"], num_redundant_experts=2)
    rows = expert_params_mapping(*naming, 3, 2, base_layer=bool(wrapped))
    assert mapped == {name: assignments(name, rows) for name in names}
    assert [len(found) for found in mapped.values()] == [2] * (2 * len(names) // 3) + [1] * (len(names) // 3)


def test_layers_are_told_apart() -> None:
    """One has more experts than the other, other names, or all of them in one tensor."""
    names = ["a.experts.7.w1.weight", "b.experts.1.up_proj.weight", "b.experts.0.gate_proj.weight", "c.experts.up_proj"]
    found = {
        name: [(param, row.expert_id, row.shard_id) for param, row in places]
        for name, places in map_names(names, num_redundant_experts=2).items()
    }
    assert found == {
        "a.experts.7.w1.weight": [("a.experts.w13_weight", 7, "w1")],
        "b.experts.1.up_proj.weight": [("b.experts.w13_weight", 1, "w3"), ("b.experts.w13_weight", 3, "w3")],
        "b.experts.0.gate_proj.weight": [("b.experts.w13_weight", 0, "w1"), ("b.experts.w13_weight", 2, "w1")],
        "c.experts.up_proj": [("c.experts.w13_weight", 0, "w1")],
    }
    assert map_names(["d.experts.0.novel.weight"]) == {"d.experts.0.novel.weight": []}
