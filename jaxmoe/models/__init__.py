"""Decoders of known families. A family is one file and a line in `FAMILIES`."""

from jaxmoe.models.decoder import Decoder
from jaxmoe.models.family import ExpertTensors, Family
from jaxmoe.models.mixtral import MIXTRAL
from jaxmoe.models.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Decoder", "ExpertTensors", "Family", "get_family"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL, QWEN3_MOE)}


def get_family(model_type: str) -> Family:
    """The family that config.json calls `model_type`.

    Raises:
        ValueError: it is not known here.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not known; jaxmoe loads {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
