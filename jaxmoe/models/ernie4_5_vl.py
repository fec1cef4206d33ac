"""ERNIE-4.5-VL: text and images have routed experts of their own, and the text part is an ernie4_5_moe model."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import pick, pick_layer_types

# Stands for the numbers of the vision part's experts in a rule, which depend on how many the text part has.
VISION_EXPERTS = "{vision_experts}"

_BY_MODALITY = ("moe_num_experts", "num_experts", "moe_k", "num_experts_per_tok", "moe_layer_start_index")


def text_settings(text: Mapping[str, Any]) -> dict[str, Any]:
    """Spell the text part's settings as ernie4_5_moe does, which has one number where there is one for each modality.

    Raises:
        ValueError: both modalities have to have the same number and do not, or routed experts are not in one run of layers.
    """
    own = {name: value for name, value in text.items() if name != "mlp_layer_types"}
    for name in _BY_MODALITY:
        if isinstance(text.get(name), list):
            own[name] = _same(name, text[name])
    # Widths differ, and layers behind the last one have neither.
    for name in ("moe_intermediate_size", "moe_layer_end_index"):
        if isinstance(text.get(name), list):
            own[name] = _pair(name, text[name])[0]
    count = pick(text, "num_hidden_layers")
    if isinstance(ends := text.get("moe_layer_end_index"), list):
        _same("moe_layer_end_index", [count - 1 if end == -1 else min(end, count - 1) for end in ends])
    if text.get("mlp_layer_types") is not None:
        own |= _run_of_sparse(text, count)
    return own


def _run_of_sparse(text: Mapping[str, Any], count: int) -> dict[str, int]:
    """The first and the last layer with routed experts, of a list of kinds."""
    kinds = pick_layer_types(text, ["dense"] * count, "dense", "sparse", name="mlp_layer_types")
    sparse = [i for i, kind in enumerate(kinds) if kind == "sparse"]
    if not sparse or sparse != list(range(sparse[0], sparse[-1] + 1)):
        raise ValueError(
            "layers with routed experts of ernie4_5_vl_moe follow one another; mlp_layer_types has 'sparse' for "
            f"{sparse or 'none'}"
        )
    return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": 1}


def _pair(name: str, values: list[Any]) -> list[Any]:
    if len(values) != 2 or not all(type(value) is int for value in values):
        raise ValueError(f"{name} of ernie4_5_vl_moe is an integer for text and one for vision; it is {values!r:.80}")
    return values


def _same(name: str, values: list[Any]) -> int:
    """The number that both modalities have."""
    text, vision = _pair(name, values)
    if text != vision:
        raise ValueError(
            f"{name} of ernie4_5_vl_moe is the same for text and vision, whose tensors are told apart by it; it is {values}"
        )
    return text
