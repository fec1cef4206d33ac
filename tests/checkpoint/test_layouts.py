"""The layout of a layer's experts is found from names and shapes, as far as they tell."""

import pytest

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.mapping.layouts import detect_expert_layout

D, F = 12, 5
PER_EXPERT = {f"m.experts.{e}.{part}.weight": (F, D) for e in range(11) for part in ("gate_proj", "up_proj")} | {
    f"m.experts.{e}.down_proj.weight": (D, F) for e in range(11)
}
BOTH = {f"m.experts.{e}.gate_up_proj.weight": (2 * F, D) for e in range(2)} | {"m.experts.0.down_proj.weight": (D, F)}
FUSED = {"m.experts.gate_up_proj": (11, 2 * F, D), "m.experts.down_proj": (11, D, F)}
TRANSPOSED = {"m.experts.gate_up_proj": (11, D, 2 * F), "m.experts.down_proj": (11, F, D)}
BIASED = TRANSPOSED | {"m.experts.gate_up_proj_bias": (11, 2 * F), "m.experts.down_proj_bias": (11, D)}
STACKED = {f"m.experts.{part}.weight": (11, F, D) for part in ("gate_proj", "up_proj")} | {
    "m.experts.down_proj.weight": (11, D, F)
}
LAYOUTS = {
    "per_expert": PER_EXPERT,
    "per_expert_gate_up": BOTH,
    "fused": FUSED,
    "fused_transposed": TRANSPOSED,
    "fused_interleaved": BIASED,
    "stacked": STACKED,
}


@pytest.mark.parametrize(("layout", "tensors"), LAYOUTS.items(), ids=LAYOUTS)
def test_layouts(layout: str, tensors: dict[str, tuple[int, ...]]) -> None:
    beside = {"m.gate.weight": (11, D), "m.shared_experts.gate_proj.weight": (F, D), "m2.experts.down_proj": (1, 2, 3)}
    for expected in (None, layout):
        found = detect_expert_layout(tensors | beside, "m.experts", model_width=D, expert_width=F, expected=expected)
        assert found == layout


@pytest.mark.parametrize(("model", "width"), [(10, 5), (5, 5), (10, 10)])
def test_orientation_where_one_tensor_alone_cannot_tell(model: int, width: int) -> None:
    rows = {"x.experts.gate_up_proj": (4, 2 * width, model), "x.experts.down_proj": (4, model, width)}
    columns = {name: (shape[0], shape[2], shape[1]) for name, shape in rows.items()}
    sizes = {"model_width": model, "expert_width": width}
    assert detect_expert_layout(rows, "x.experts", **sizes) == "fused"
    assert detect_expert_layout(columns, "x.experts", **sizes) == "fused_transposed"


def test_layouts_of_one_checkpoint_may_differ() -> None:
    tensors = PER_EXPERT | {name.replace("m.", "mtp."): shape for name, shape in FUSED.items()}
    sizes = {"model_width": D, "expert_width": F}
    assert detect_expert_layout(tensors, "m.experts", **sizes) == "per_expert"
    assert detect_expert_layout(tensors, "mtp.experts", **sizes) == "fused"


def test_the_family_tells_interleaved_from_halves() -> None:
    sizes = {"model_width": D, "expert_width": F}
    for expected in ("fused_transposed", "fused_interleaved"):
        for tensors in (TRANSPOSED, BIASED):
            assert detect_expert_layout(tensors, "m.experts", **sizes, expected=expected) == expected


def test_layouts_that_contradict() -> None:
    sizes = {"model_width": D, "expert_width": F}
    with pytest.raises(CheckpointError, match=r"gate_up_proj' \(fused\) and .*' \(per_expert\) are there at once"):
        detect_expert_layout(PER_EXPERT | FUSED, "m.experts", **sizes)
    with pytest.raises(CheckpointError, match="there is nothing;"):
        detect_expert_layout(PER_EXPERT, "model.experts", **sizes)
    with pytest.raises(CheckpointError, match=r"should be fused_transposed, which is .* those of fused;"):
        detect_expert_layout(FUSED, "m.experts", **sizes, expected="fused_transposed")
    with pytest.raises(CheckpointError, match="should be per_expert"):
        detect_expert_layout(FUSED, "m.experts", **sizes, expected="per_expert")
    with pytest.raises(CheckpointError, match=r"are \[E, 12, 12\] and .* has \(11, 10, 12\)"):
        detect_expert_layout(FUSED, "m.experts", model_width=D, expert_width=6)
    with pytest.raises(CheckpointError, match=r"has \(11, 10, 12\) and \(11, 5, 12\)"):
        detect_expert_layout(FUSED | {"m.experts.down_proj": (11, F, D)}, "m.experts", **sizes)
    with pytest.raises(CheckpointError, match=r"'m.experts.down_proj' is missing"):
        detect_expert_layout({"m.experts.gate_up_proj": (11, 10, 12)}, "m.experts", **sizes)
