"""Decoders of known families. A family is one file and a line in `FAMILIES`."""

from pathlib import Path

from jaxmoe.config import DecoderConfig, read_config_json
from jaxmoe.models.dbrx import DBRX
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.ernie4_5_moe import ERNIE4_5_MOE
from jaxmoe.models.family import ExpertTensors, Family
from jaxmoe.models.glm4_moe import GLM4_MOE
from jaxmoe.models.gpt_oss import GPT_OSS
from jaxmoe.models.granitemoe import GRANITEMOE
from jaxmoe.models.hunyuan_v1_moe import HUNYUAN_V1_MOE
from jaxmoe.models.llama4 import LLAMA4_TEXT
from jaxmoe.models.minimax_m2 import MINIMAX_M2
from jaxmoe.models.mixtral import MIXTRAL
from jaxmoe.models.olmoe import OLMOE
from jaxmoe.models.phimoe import PHIMOE
from jaxmoe.models.qwen2_moe import QWEN2_MOE
from jaxmoe.models.qwen3_moe import QWEN3_MOE

__all__ = ["FAMILIES", "Decoder", "ExpertTensors", "Family", "get_family", "read_model_config"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        DBRX,
        ERNIE4_5_MOE,
        GLM4_MOE,
        GPT_OSS,
        GRANITEMOE,
        HUNYUAN_V1_MOE,
        MINIMAX_M2,
        LLAMA4_TEXT,
        MIXTRAL,
        OLMOE,
        PHIMOE,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}


def get_family(model_type: str) -> Family:
    """The family that config.json calls `model_type`.

    Raises:
        ValueError: it is not known here.
    """
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not known; jaxmoe loads {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def read_model_config(directory: str | Path) -> tuple[Family, DecoderConfig]:
    """The family and the config of a checkpoint directory, from its config.json alone.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not readable, of no known family, or lacks what the family needs.
    """
    raw_config = read_config_json(directory)
    family = get_family(raw_config["model_type"])
    try:
        return family, family.read_config(raw_config)
    except ValueError as error:
        raise ValueError(f"{Path(directory) / 'config.json'}: {error}") from error
