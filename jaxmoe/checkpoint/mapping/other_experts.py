"""Routed experts under the names of other tools, or one by one where a family fuses them, and the reverse.

The dims that go with each name are known, so nothing is guessed; where the shapes are others the load is refused. A layer
whose gate and up alternate in one tensor (gpt-oss) is only looked for with gate and up apart.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from jaxmoe.config import DecoderConfig, MoEConfig
from jaxmoe.models import ExpertTensors, Family

_ONE_BY_ONE = {"transformers": ("gate_proj", "up_proj", "down_proj"), "Mixtral": ("w1", "w3", "w2")}


class OtherExperts(NamedTuple):
    """Names that a checkpoint has for routed experts and its family has not.

    Attributes:
        rule: sentence on them, for a report.
        names: the names, with ``{layer}`` and ``{expert}`` in them.
    """

    rule: str
    names: ExpertTensors


def find_other_experts(tensors: Collection[str], family: Family, config: DecoderConfig) -> OtherExperts | None:
    """Find the names of the routed experts in a checkpoint whose layers do not all have those of their family.

    Args:
        tensors: names under the family's prefix.
        family: family of the model.
        config: config of the model.

    Returns:
        The first known names of which one such layer has all; None where all layers have the family's, or one has none that
        is known.
    """
    own = [family.experts, *([family.renamed_experts] if family.renamed_experts else [])]
    for layer in config.moe_layers:
        if any(family.experts_in_layer(names, layer).are_in(tensors) for names in own):
            continue
        moe = config.layers[layer].feed_forward
        assert isinstance(moe, MoEConfig)
        for other in _known_names(family.experts, biased=moe.bias):
            names = family.experts_in_layer(other.names, layer)
            wanted = names.fused or [name for expert in range(moe.num_experts) for name in names.per_expert(expert)]
            if all(name in tensors for name in wanted):
                return other
        return None
    return None


def _known_names(own: ExpertTensors, *, biased: bool) -> Iterator[OtherExperts]:
    """Names by which a family's experts are known to be called, with the family's own place for them."""
    interleaved = own.fused_layout == "fused_interleaved"
    gated = own.gate is not None or own.fused_gate is not None or own.fused_gate_up is not None
    for block, experts in _places(own):
        for tool, (gate, up, down) in _ONE_BY_ONE.items():
            parts = {"gate": gate, "up": up, "down": down} if gated else {"up": up, "down": down}
            names: dict[str, Any] = {part: f"{experts}.{{expert}}.{name}.weight" for part, name in parts.items()}
            yield OtherExperts(f"routed experts are there one by one, by {tool}'s names", ExpertTensors(**names))
        stacks = {
            "stacked, gate and up apart": {part: f"{experts}.{part}_proj" for part in ("gate", "up", "down")},
            "stacked by MLX's names": {part: f"{block}.switch_mlp.{part}_proj" for part in ("gate", "up", "down")},
            "stacked by torchtitan's names": {"gate": f"{experts}.w1", "up": f"{experts}.w3", "down": f"{experts}.w2"},
        }
        for how, stack in stacks.items():
            for suffix in ("", ".weight"):
                yield OtherExperts(f"routed experts are {how}", _stacked(stack, suffix, gated=gated, biased=biased))
        if gated and not interleaved and not biased:
            pairs = {
                "fused": (f"{experts}.gate_up_proj", f"{experts}.down_proj"),
                "fused, with .weight": (f"{experts}.gate_up_proj.weight", f"{experts}.down_proj.weight"),
                "fused by vLLM's names": (f"{experts}.w13_weight", f"{experts}.w2_weight"),
            }
            for how, (gate_up, down) in pairs.items():
                yield OtherExperts(
                    f"routed experts are {how}", ExpertTensors(fused_gate_up=gate_up, fused_down=down, either_way=True)
                )


def _stacked(stack: Mapping[str, str], suffix: str, *, gated: bool, biased: bool) -> ExpertTensors:
    parts = ("gate", "up", "down") if gated else ("up", "down")
    names: dict[str, Any] = {f"fused_{part}": f"{stack[part]}{suffix}" for part in parts}
    if biased:
        names |= {f"fused_{part}_bias": f"{stack[part]}{'.bias' if suffix else '_bias'}" for part in parts}
    return ExpertTensors(**names, fused_layout="stacked")


def _places(own: ExpertTensors) -> Iterator[tuple[str, str]]:
    """(module of a layer's block, module of its experts), as the family's names have them, without repeats."""
    seen = set()
    for name in filter(None, (own.up, own.fused_gate_up, own.fused_up)):
        block = re.sub(r"(\.experts)?(\.mlp)?(\.\{expert\})?\.\w+(\.weight)?$", "", name)
        if block not in seen:
            seen.add(block)
            yield block, f"{block}.experts"
