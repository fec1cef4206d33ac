"""Sizes and quantization of a model whose family may not be known, from config.json in any spelling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.config import read_json

_SPELLINGS = {
    "layers": ("num_hidden_layers", "n_layers", "num_layers"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_k",
        "moe_topk",
        "top_k_experts",
        "moe_top_k",
    ),
    "model_width": ("hidden_size", "d_model"),
    "expert_width": ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size"),
}
_NESTED = ("text_config", "ffn_config", "thinker_config")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json")


def find_size(config: Mapping[str, Any], size: str) -> int | None:
    """Find a size of a model; None where the config does not say it or says it differently for each layer.

    Args:
        config: dictionary that config.json holds.
        size: "layers", "experts", "experts_per_token", "model_width" or "expert_width".
    """
    for part in _parts(config):
        for name in _SPELLINGS[size]:
            value = part.get(name)
            if isinstance(value, list) and value and all(item == value[0] for item in value):
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None


def find_quantization(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization that a checkpoint's files declare.

    Returns:
        Its entries, with "method" and "from", the name of the file; None where none is declared.
    """
    for part in _parts(config):
        for key in _QUANTIZATION_KEYS:
            if isinstance(part.get(key), dict):
                return _described(part[key], "config.json")
    for name in _QUANTIZATION_FILES:
        document = read_json(directory / name)
        if document:
            # ModelOpt has its settings one level down, beside the producer's name.
            inner = document.get("quantization")
            return _described(inner if isinstance(inner, dict) else document, name)
    return None


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and the configs of parts of the model in it, at any depth."""
    nested = [_parts(config[key]) for key in _NESTED if isinstance(config.get(key), dict)]
    return [config, *[part for parts in nested for part in parts]]


def _described(settings: Mapping[str, Any], file: str) -> dict[str, Any]:
    method = settings.get("quant_method") or settings.get("quant_algo") or "unnamed"
    # Lists of modules have an entry for each layer and say little.
    plain = {key: value for key, value in settings.items() if isinstance(value, str | int | float) or value is None}
    sizes = {key: value for key, value in settings.items() if key == "weight_block_size"}
    return {"method": method, "from": file, **plain, **sizes}
