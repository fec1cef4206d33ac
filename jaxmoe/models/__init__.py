"""Decoders of known families. A family is one file and a line in `FAMILIES`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.config import DecoderConfig, check_agreement, directory_of, find_checkpoint, read_config_json
from jaxmoe.models.adapters import AdapterPlaces, HeldAdapter
from jaxmoe.models.afmoe import AFMOE
from jaxmoe.models.bailing_hybrid import BAILING_HYBRID
from jaxmoe.models.dbrx import DBRX
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.deepseek_v2 import DEEPSEEK_V2
from jaxmoe.models.deepseek_v3 import DEEPSEEK_V3, KIMI_K2
from jaxmoe.models.deepseek_v4 import DEEPSEEK_REF, DEEPSEEK_V4
from jaxmoe.models.deepseek_v32 import DEEPSEEK_V32, GLM_MOE_DSA
from jaxmoe.models.ernie4_5_moe import ERNIE4_5_MOE
from jaxmoe.models.exaone_moe import EXAONE_MOE
from jaxmoe.models.family import ExpertLayout, ExpertTensors, Family, Form
from jaxmoe.models.flex_olmo import FLEX_OLMO
from jaxmoe.models.gemma4 import GEMMA4_TEXT
from jaxmoe.models.glm4_moe import GLM4_MOE
from jaxmoe.models.glm4_moe_lite import GLM4_MOE_LITE
from jaxmoe.models.glm5_next import GLM5_NEXT_TEXT
from jaxmoe.models.gpt_oss import GPT_OSS
from jaxmoe.models.granitemoe import GRANITEMOE
from jaxmoe.models.granitemoehybrid import GRANITEMOEHYBRID
from jaxmoe.models.granitemoeshared import GRANITEMOESHARED
from jaxmoe.models.hunyuan_v1_moe import HUNYUAN_V1_MOE
from jaxmoe.models.hy_v3 import HY_V3
from jaxmoe.models.jamba import JAMBA
from jaxmoe.models.kimi_linear import KIMI_LINEAR
from jaxmoe.models.lfm2_moe import LFM2_MOE
from jaxmoe.models.llama4 import LLAMA4_TEXT
from jaxmoe.models.longcat_flash import LONGCAT_FLASH
from jaxmoe.models.mimo_v2_flash import MIMO_V2_FLASH
from jaxmoe.models.minimax_m2 import MINIMAX_M2
from jaxmoe.models.minimax_m3 import MINIMAX_M3, MINIMAX_M3_TEXT
from jaxmoe.models.mixtral import MIXTRAL
from jaxmoe.models.nemotron_h import NEMOTRON_H
from jaxmoe.models.olmoe import OLMOE
from jaxmoe.models.origin import Origin
from jaxmoe.models.phimoe import PHIMOE
from jaxmoe.models.qwen2_moe import QWEN2_MOE
from jaxmoe.models.qwen3_5_moe import QWEN3_5_MOE_TEXT
from jaxmoe.models.qwen3_moe import QWEN3_MOE
from jaxmoe.models.qwen3_next import QWEN3_NEXT
from jaxmoe.models.qwen4_exp import QWEN4_EXP_TEXT
from jaxmoe.models.solar_open import SOLAR_OPEN
from jaxmoe.models.step3p5 import STEP3P5
from jaxmoe.models.wrappers import WRAPPERS, Wrapper
from jaxmoe.rotary import check_rope_agreement

__all__ = [
    "FAMILIES",
    "WRAPPERS",
    "AdapterPlaces",
    "Decoder",
    "ExpertLayout",
    "ExpertTensors",
    "Family",
    "Form",
    "HeldAdapter",
    "Origin",
    "Wrapper",
    "find_family",
    "get_family",
    "read_model_config",
]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        AFMOE,
        BAILING_HYBRID,
        DBRX,
        DEEPSEEK_REF,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        DEEPSEEK_V32,
        DEEPSEEK_V4,
        ERNIE4_5_MOE,
        EXAONE_MOE,
        FLEX_OLMO,
        GEMMA4_TEXT,
        GLM4_MOE,
        GLM4_MOE_LITE,
        GLM5_NEXT_TEXT,
        GLM_MOE_DSA,
        GPT_OSS,
        GRANITEMOE,
        GRANITEMOEHYBRID,
        GRANITEMOESHARED,
        HUNYUAN_V1_MOE,
        HY_V3,
        JAMBA,
        KIMI_K2,
        KIMI_LINEAR,
        LFM2_MOE,
        LONGCAT_FLASH,
        MIMO_V2_FLASH,
        MINIMAX_M2,
        MINIMAX_M3,
        MINIMAX_M3_TEXT,
        LLAMA4_TEXT,
        MIXTRAL,
        NEMOTRON_H,
        OLMOE,
        PHIMOE,
        QWEN2_MOE,
        QWEN3_5_MOE_TEXT,
        QWEN3_MOE,
        QWEN3_NEXT,
        QWEN4_EXP_TEXT,
        SOLAR_OPEN,
        STEP3P5,
    )
}


def get_family(model_type: str) -> Family:
    """Look up the family that config.json calls `model_type`.

    Raises:
        ValueError: it is not known here.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not known; jaxmoe loads {', '.join(sorted(FAMILIES))}, and the text part of "
            f"{', '.join(sorted(WRAPPERS))}"
        )
    return FAMILIES[model_type]


def find_family(config: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """Find the family of a model, and the part of its config.json that the family reads.

    For a multimodal model that is the family of its text part (`Family.wrapper` is set), with the text part's config.

    Raises:
        ValueError: no family is known for it, or two settings of one thing differ.
    """
    wrapper = WRAPPERS.get(config["model_type"])
    if wrapper is None:
        family = get_family(config["model_type"])
        inner = config.get("text_config")
        _check(config, inner if isinstance(inner, dict) else None)
        return family, config
    _check(*wrapper.parts(config))
    text = wrapper.text_config(config)
    return dataclasses.replace(get_family(text["model_type"]), wrapper=wrapper), text


def _check(config: Mapping[str, Any], text: Mapping[str, Any] | None) -> None:
    check_agreement(config, text)
    check_rope_agreement(config, text)


def read_model_config(directory: str | Path, *, mtp: bool = False) -> tuple[Family, DecoderConfig]:
    """Read the family and the config of a checkpoint from its config.json alone.

    Args:
        directory: checkpoint, given as for `find_checkpoint`.
        mtp: whether the model has its layers for multi-token prediction, see `Family.with_mtp`.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is not readable, of no known family, lacks what the family needs, or has no such layers.
    """
    directory = directory_of(find_checkpoint(directory))
    raw_config = read_config_json(directory)
    try:
        family, text_config = find_family(raw_config)
        return family.read(text_config, mtp=mtp)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
