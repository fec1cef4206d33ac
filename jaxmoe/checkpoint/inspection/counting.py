"""Counts of a checkpoint's tensors by group, dtype and layout, from their names and shapes."""

import contextlib
import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import Checkpoint, find_size
from jaxmoe.checkpoint.inspection.grouping import GROUPS, group_of, quantized_base
from jaxmoe.checkpoint.mapping import detect_expert_layout
from jaxmoe.config import DecoderConfig, MoEConfig

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass
class MoESizes:
    """Sizes of a model's MoE layers; None for what is not known.

    Attributes:
        experts: experts E, the largest number over the layers.
        per_token: experts K of a token, likewise.
        share: function from a layer to its share K/E.
    """

    experts: int | None
    per_token: int | None
    share: Callable[[int | None], float | None]

    @classmethod
    def known(cls, config: DecoderConfig) -> "MoESizes":
        """Those of a family's config."""
        moes = {i: layer.feed_forward for i, layer in enumerate(config.layers)}
        routed = {i: moe for i, moe in moes.items() if isinstance(moe, MoEConfig)}
        experts = max((moe.num_experts for moe in routed.values()), default=None)
        per_token = max((moe.num_experts_per_tok for moe in routed.values()), default=None)
        shares = {i: moe.experts_met / moe.num_experts for i, moe in routed.items()}

        def share(layer: int | None) -> float | None:
            # A family may count layers otherwise in names; where all are alike, that makes no difference.
            return next(iter(shares.values())) if len(set(shares.values())) == 1 else shares.get(layer or 0)

        return cls(experts, per_token, share)

    @classmethod
    def guessed(cls, config: Mapping[str, Any]) -> "MoESizes":
        """Those that config.json gives in any spelling, of a family that is not known."""
        experts, per_token = find_size(config, "experts"), find_size(config, "experts_per_token")
        return cls(experts, per_token, lambda _: per_token / experts if experts and per_token else None)


def stored_shapes(checkpoint: Checkpoint) -> Shapes | None:
    """Collect shapes as stored, scales left out; None where values are packed, so that shapes say nothing."""
    shapes: Shapes = {}
    for name, tensor in checkpoint.tensors.items():
        part = quantized_base(name)
        if part is None:
            shapes[name] = tensor.shape
        elif part[1]:
            return None
    return shapes


def hides_experts(shapes: Shapes, moe: MoESizes) -> bool:
    """Whether an unknown family has routed experts, or some of them, under names that tell nothing.

    Then it is not known what a token meets: experts that are taken for something else would be counted for every token.
    """
    groups = {name: group_of(name) for name in shapes}
    if moe.experts is not None and moe.experts > 1 and "routed experts" not in groups.values():
        return True
    apart = {"routed experts", "shared experts", "router"}
    others = [name for name, group in groups.items() if group not in apart and len(shapes[name]) > 1]
    stacks = [name for name in others if len(shapes[name]) == 3 and shapes[name][0] == moe.experts]
    return bool(stacks) or any(re.search(r"expert|moe", name) for name in others)


def bytes_by_format(checkpoint: Checkpoint, dropped: Collection[str]) -> dict[str, dict[str, int]]:
    """Count {group: {quantized format, or "plain": bytes}}, without the tensors that are dropped."""
    formats: dict[str, Counter[str]] = defaultdict(Counter)
    for name, tensor in checkpoint.tensors.items():
        if name not in dropped:
            formats[group_of(name)][tensor.form] += tensor.nbytes
    return {group: dict(sizes) for group, sizes in formats.items()}


def count_active(shapes: Shapes, moe: MoESizes) -> int | None:
    """Count the parameters that one token meets; None where the share of a layer's experts is not known."""
    active = 0.0
    for name, shape in shapes.items():
        share = moe.share(_layer(name)) if group_of(name) == "routed experts" else 1.0
        if share is None:
            return None
        active += math.prod(shape) * share
    return round(active)


def group_sizes(
    checkpoint: Checkpoint, shapes: Shapes | None, dropped: Collection[str]
) -> dict[str, dict[str, int | None]]:
    """Count tensors, parameters and bytes of each group.

    Args:
        checkpoint: tensors as stored.
        shapes: shapes of the model's own tensors, by name; None where they are not known.
        dropped: tensors that a rule ignores, a group of their own.
    """
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        group = "ignored by rule" if name in dropped else group_of(name)
        tensors[group] += 1
        sizes[group] += tensor.nbytes
    parameters: Counter[str] = Counter()
    for name, shape in (shapes or {}).items():
        parameters[group_of(name)] += math.prod(shape)
    return {
        group: {
            "tensors": tensors[group],
            "parameters": None if shapes is None or group == "ignored by rule" else parameters[group],
            "bytes": sizes[group],
        }
        for group in GROUPS
        if tensors[group]
    }


def find_layouts(checkpoint: Checkpoint, config: Mapping[str, Any], dropped: Collection[str]) -> dict[str, list[int]]:
    """Find {layout of routed experts: layers}, from names and, where they are not packed, shapes."""
    by_prefix: dict[str, Shapes] = defaultdict(dict)
    for name, tensor in checkpoint.tensors.items():
        found = re.match(r"(.*\bexperts)\.", name)
        if found and name not in dropped and group_of(name) == "routed experts":
            by_prefix[found[1]][name] = tensor.shape
    width, expert_width = find_size(config, "model_width"), find_size(config, "expert_width")
    result: dict[str, list[int]] = defaultdict(list)
    for prefix, shapes in by_prefix.items():
        layout = "per_expert" if re.match(r"\d+\.", next(iter(shapes))[len(prefix) + 1 :]) else "fused"
        if width and expert_width:
            with contextlib.suppress(CheckpointError):
                layout = detect_expert_layout(shapes, prefix, model_width=width, expert_width=expert_width)
        layer = _layer(prefix)
        if layer is not None:
            result[layout].append(layer)
    return {layout: sorted(layers) for layout, layers in result.items()}


def bytes_by_dtype(checkpoint: Checkpoint) -> dict[str, int]:
    """Count {dtype: bytes}, the most first."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        sizes[tensor.dtype_name] += tensor.nbytes
    return dict(sizes.most_common())


def _layer(name: str) -> int | None:
    found = re.search(r"\.(?:layers|blocks|h)\.(\d+)\.", f".{name}.")
    return int(found[1]) if found else None
