"""The dims of each expert layout, and the layout of a layer's experts, from their tensors' names and shapes.

D is the model's width, F the expert's, E the number of experts. `jaxmoe.models.ExpertLayout` says what the layouts are;
`PATTERNS` has their dims. "fused" and "fused_transposed" have the same names. Their shapes are the same for gate and up
where 2F = D, and for down where F = D; as both cannot be, the two tensors together always tell. "fused_transposed" and
"fused_interleaved" differ in no shape at all: there the family decides.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import Split
from jaxmoe.models import ExpertLayout

Shape = tuple[int, ...]
Name = TypeVar("Name", bound=str)


class Pattern(NamedTuple):
    """The dims of an expert's tensors, outermost first, in letters: E experts, 2 gate and up, F and D their widths.

    A dim of several letters holds them row-major: "2F" is all of gate before all of up, "F2" both in turns. Without a
    "2" gate and up are a tensor each. The biases of `up` have no D, those of `down` no F.
    """

    up: str
    down: str

    @property
    def biases(self) -> "Pattern":
        """The dims of the biases that go with them."""
        return Pattern(self.up.replace("D", "").strip(), self.down.replace("F", "").strip())


PATTERNS: dict[ExpertLayout, Pattern] = {
    "per_expert": Pattern("F D", "D F"),
    "per_expert_gate_up": Pattern("2F D", "D F"),
    "fused": Pattern("E 2F D", "E D F"),
    "fused_transposed": Pattern("E D 2F", "E F D"),
    "fused_interleaved": Pattern("E D F2", "E F D"),
    "stacked": Pattern("E F D", "E D F"),
    "stacked_rows": Pattern("EF D", "EF D"),
}


def split_of(dims: str, sizes: Mapping[str, int]) -> Split:
    """The sizes of the letters in each dim of a pattern.

    Example:
        >>> split_of("E 2F D", {"E": 4, "2": 2, "F": 3, "D": 8})
        ((4,), (2, 3), (8,))
    """
    return tuple([tuple([sizes[letter] for letter in dim]) for dim in dims.split()])


def shape_of(dims: str, sizes: Mapping[str, int]) -> Shape:
    """The shape of a tensor whose dims are those of a pattern."""
    return tuple([math.prod(letters) for letters in split_of(dims, sizes)])


def only_layout(found: Mapping[Name, str]) -> Name:
    """The one layout in which the experts of a layer are there.

    Args:
        found: {layout: a tensor that shows it}, at least one.

    Raises:
        CheckpointError: there are several.
    """
    if len(found) > 1:
        raise CheckpointError(
            "the experts of a layer are there in one layout; "
            f"{' and '.join(f'{name!r} ({layout})' for layout, name in sorted(found.items()))} are there at once, and "
            "nothing says which is meant; remove all but one of them from the checkpoint"
        )
    return next(iter(found))


def detect_expert_layout(
    tensors: Mapping[str, Shape],
    prefix: str,
    *,
    model_width: int,
    expert_width: int,
    expected: ExpertLayout | None = None,
) -> ExpertLayout:
    """Find the layout of one layer's experts.

    Args:
        tensors: name -> shape, of the whole checkpoint or of a part that holds the layer.
        prefix: name of the layer's experts, "model.layers.0.mlp.experts". Layers of one checkpoint may differ.
        model_width: D.
        expert_width: F.
        expected: layout that the family writes, if it is known. It decides where shapes cannot, and is checked
            where they can.

    Returns:
        The layout.

    Raises:
        CheckpointError: there are no experts, they are there in two layouts, or their shapes fit none or another one.

    Example:
        >>> shapes = {"mlp.experts.gate_up_proj": (4, 16, 8), "mlp.experts.down_proj": (4, 8, 8)}
        >>> detect_expert_layout(shapes, "mlp.experts", model_width=8, expert_width=8)
        'fused'
    """
    found = _found(tensors, prefix)
    if not found:
        raise CheckpointError(
            f"the experts of a layer are there in one layout; under {prefix!r} there is nothing; does config.json belong "
            "to this checkpoint?"
        )
    kind = only_layout(found)
    layout = kind if kind != "fused" else _orientation(tensors, prefix, model_width, expert_width, expected)
    if expected is not None and layout != expected:
        raise CheckpointError(
            f"the experts under {prefix!r} should be {expected}, which is what the model's family writes; their names and "
            f"shapes are those of {layout}; does config.json belong to this checkpoint?"
        )
    return layout


def _found(tensors: Mapping[str, Shape], prefix: str) -> dict[ExpertLayout, str]:
    """The layouts under `prefix`, each with a tensor that shows it by its name; "fused" may still be transposed."""
    result: dict[ExpertLayout, str] = {}
    for name in tensors:
        if not name.startswith(f"{prefix}."):
            continue
        tail = name[len(prefix) + 1 :].replace("base_layer.", "").removesuffix(".weight")
        if re.match(r"(0|[1-9]\d*)\.", tail):
            # Each projection has its own name in a family (w1, gate_proj, linear_1); one for both has two known ones.
            part = tail.split(".")[1]
            if part in ("gate_up_proj", "w13"):
                result["per_expert_gate_up"] = name
            elif part not in ("down_proj", "w2"):
                result["per_expert"] = name
        elif tail == "gate_up_proj":
            result["fused"] = name
        elif tail in ("gate_proj", "up_proj"):
            result["stacked"] = name
    return result


def _orientation(
    tensors: Mapping[str, Shape], prefix: str, model: int, width: int, expected: ExpertLayout | None
) -> ExpertLayout:
    """Tell "fused" from the two layouts of (in, out) by the shapes of both tensors."""
    gate_up, down = (_shape(tensors, f"{prefix}.{part}") for part in ("gate_up_proj", "down_proj"))
    sizes = {"E": gate_up[0] if gate_up else 0, "2": 2, "F": width, "D": model}

    def fits(layout: ExpertLayout) -> bool:
        return all(
            shape_of(dims, sizes) == shape for dims, shape in zip(PATTERNS[layout], (gate_up, down), strict=True)
        )

    assert not (fits("fused") and fits("fused_transposed")), "2F = D and F = D at once"
    if fits("fused"):
        return "fused"
    if fits("fused_transposed"):
        # Only the family knows whether columns are interleaved; where it does not say, biases do: gpt-oss has them.
        if expected in ("fused_transposed", "fused_interleaved"):
            return expected
        return "fused_interleaved" if f"{prefix}.gate_up_proj_bias" in tensors else "fused_transposed"
    raise CheckpointError(
        f"fused experts of D={model} and F={width} are [E, {2 * width}, {model}] and [E, {model}, {width}], or both with "
        f"the last two dims swapped; {prefix!r} has {gate_up} and {down}; does config.json belong to this checkpoint?"
    )


def _shape(tensors: Mapping[str, Shape], name: str) -> Shape:
    for found in (name, f"{name}.weight", name.replace("experts.", "experts.base_layer.")):
        if found in tensors:
            return tensors[found]
    raise CheckpointError(f"fused experts are gate_up_proj and down_proj; {name!r} is missing; finish the download")
