"""The parts of a model by the paths of its parameters, and the forms in which they are held."""

import re
from collections import Counter, defaultdict
from typing import Any

from flax import nnx

from jaxmoe.layers import packings_of, param_specs, unpacked_specs
from jaxmoe.layers.weights import PART_ENDINGS

# The linear layers that quantizing is about: routers, embeddings, the head and mixers with a state are none.
_LINEAR_KINDS = (
    ("routed experts", re.compile(r".*\.moe\.w_(gate_up|down)")),
    ("shared experts", re.compile(r".*\.moe\.shared\.w_(gate|up|down)")),
    ("dense MLP", re.compile(r".*\.mlp\.w_(gate|up|down)")),
    ("attention", re.compile(r".*\.attention\.w_(q|k|v|o|q_a|q_b|kv_a|kv_b)")),
)
_EXPERT_STACK = re.compile(rf"\.moe\.[wb]_(gate_up|down)({'|'.join(PART_ENDINGS.values())})$")


def is_expert_stack(path: str) -> bool:
    """Whether a parameter is a stack of routed experts."""
    return _EXPERT_STACK.search(path) is not None


def part_of(path: str) -> str:
    """The part of a model that a parameter belongs to; an expert stack to "routed experts", whatever its slots hold."""
    if is_expert_stack(path):
        return "routed experts"
    if ".moe.shared." in path or path.endswith("w_shared_gate"):
        return "shared experts"
    if ".attention." in path:
        return "attention"
    return "embedding and head" if path.startswith(("embed.", "lm_head.")) else "other"


def linear_kind(path: str) -> str:
    """The kind of linear layer that a parameter is of, as encoders name kinds; "" for one that is not quantized."""
    return next((kind for kind, pattern in _LINEAR_KINDS if pattern.fullmatch(path)), "")


def held_forms(model: nnx.Module, dtype: Any) -> dict[str, dict[str, int]]:
    """Count the matrices of each part of a model by the form that they are held in.

    Args:
        model: model, with values or without.
        dtype: dtype of its plain weights.

    Returns:
        {part: {packed form, or a dtype: matrices or stacks of them}}.
    """
    forms: dict[str, Counter[str]] = defaultdict(Counter)
    packings = packings_of(model)
    for spec in unpacked_specs(param_specs(model), packings, dtype):
        if len(spec.shape) > 1 and not spec.path.rpartition(".")[2].startswith("b_"):  # no biases of experts
            packing = packings.get(spec.path)
            forms[part_of(spec.path)][spec.dtype.name if packing is None else packing.describe()] += 1
    return {part: dict(counts) for part, counts in forms.items()}


def describe_packed(model: nnx.Module, dtype: Any) -> str:
    """Name the parts of a model that are held packed, and their forms; an empty text where none is.

    Args:
        model: model, with values or without.
        dtype: dtype of its plain weights.
    """
    packed = {packing.describe() for packing in packings_of(model).values()}
    parts = []
    for part, forms in held_forms(model, dtype).items():
        if found := [form for form in forms if form in packed]:
            count, total = sum(forms[form] for form in found), sum(forms.values())
            some = "" if count == total else f" ({count} of {total} matrices)"
            parts.append(f"{part} as {' and '.join(found)}{some}")
    return "; ".join(parts)
