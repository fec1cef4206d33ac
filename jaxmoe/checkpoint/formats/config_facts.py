"""Sizes of a model whose family may not be known, from config.json in any spelling."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import SPELLINGS, config_parts

_SPELLINGS = {
    "layers": (SPELLINGS["layers"], ("num_layers",)),
    "experts": (SPELLINGS["experts"],),
    "experts_per_token": (SPELLINGS["experts per token"],),
    "model_width": (SPELLINGS["model width"],),
    "expert_width": (SPELLINGS["expert width"], SPELLINGS["dense width"]),
}
"""Size -> names of one thing each, the first that are there counting."""


def find_size(config: Mapping[str, Any], size: str) -> int | None:
    """Find a size of a model; None where the config does not say it, or says it twice and differently, or so for each layer.

    Args:
        config: dictionary that config.json holds.
        size: "layers", "experts", "experts_per_token", "model_width" or "expert_width".
    """
    for part in config_parts(config):
        for names in _SPELLINGS[size]:
            values = {value for name in names if (value := _whole(part.get(name))) is not None}
            if values:
                return values.pop() if len(values) == 1 else None
    return None


def _whole(value: Any) -> int | None:
    """A whole number, or that which all of a list are; None for anything else."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    return value if type(value) is int else None
