"""Sizes and quantization of a model whose family may not be known, from config.json in any spelling."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.config import SPELLINGS, read_json

_SPELLINGS = {
    "layers": (SPELLINGS["layers"], ("num_layers",)),
    "experts": (SPELLINGS["experts"],),
    "experts_per_token": (SPELLINGS["experts per token"],),
    "model_width": (SPELLINGS["model width"],),
    "expert_width": (SPELLINGS["expert width"], SPELLINGS["dense width"]),
}
"""Size -> names of one thing each, the first that are there counting."""
_NESTED = ("text_config", "language_config", "llm_config", "thinker_config", "ffn_config")
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # the last is MLX's
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json")


def find_size(config: Mapping[str, Any], size: str) -> int | None:
    """Find a size of a model; None where the config does not say it, or says it twice and differently, or so for each layer.

    Args:
        config: dictionary that config.json holds.
        size: "layers", "experts", "experts_per_token", "model_width" or "expert_width".
    """
    for part in _parts(config):
        for names in _SPELLINGS[size]:
            values = {value for name in names if (value := _whole(part.get(name))) is not None}
            if values:
                return values.pop() if len(values) == 1 else None
    return None


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A config and the configs of parts of a model in it."""
    nested = [config[key] for key in _NESTED if isinstance(config.get(key), dict)]
    return [config, *nested, *[part["text_config"] for part in nested if isinstance(part.get("text_config"), dict)]]


def _whole(value: Any) -> int | None:
    """A whole number, or that which all of a list are; None for anything else."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    return value if type(value) is int else None


def find_quantization(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization that a checkpoint's files declare.

    Returns:
        Its entries, with "method" and "from", the name of the file; None where none is declared.
    """
    for part in _parts(config):
        for key in _QUANTIZATION_KEYS:
            if isinstance(part.get(key), dict):
                # MLX has a key of its own, and no name of a method in it.
                return _described(part[key], "config.json", "mlx" if key == "quantization" else "unnamed")
    for name in _QUANTIZATION_FILES:
        document = read_json(directory / name)
        if document:
            # ModelOpt has its settings one level down, beside the producer's name.
            inner = document.get("quantization")
            return _described(inner if isinstance(inner, dict) else document, name, "unnamed")
    return None


def _described(settings: Mapping[str, Any], file: str, usual: str) -> dict[str, Any]:
    method = settings.get("quant_method") or settings.get("quant_algo") or usual
    # Lists of modules have an entry for each layer and say little.
    plain = {key: value for key, value in settings.items() if isinstance(value, str | int | float) or value is None}
    sizes = {key: value for key, value in settings.items() if key == "weight_block_size"}
    return {"method": method, "from": file, **plain, **sizes}
