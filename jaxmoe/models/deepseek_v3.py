"""DeepSeek-V3 and Kimi-K2: latent attention, sigmoid router with a correction bias and experts in groups."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, pick
from jaxmoe.models.deepseek import DEEPSEEK_TENSORS, check_setting, read_deepseek, read_mla
from jaxmoe.models.family import MLP_EXPERTS, MTP_BEHIND, MTP_LAYERS, ROTARY_BUFFERS, Family
from jaxmoe.models.readers import read_grouped_sigmoid_router


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a deepseek_v3 or kimi_k2 checkpoint.

    Raises:
        ValueError: it asks for another score or another choice of experts than the families have.
    """
    check_setting(config, "topk_method", "noaux_tc")
    check_setting(config, "scoring_func", "sigmoid")
    return read_deepseek(
        config,
        attention=read_mla(config, interleaved=pick(config, "rope_interleave", default=True)),
        router=read_grouped_sigmoid_router(config, num_groups=8, topk_groups=4, scale=2.5),
        shared_experts=1,
        first_sparse=3,
        num_mtp_layers=pick(config, "num_nextn_predict_layers", "num_mtp_layers", default=1),
    )


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    read_config=read_config,
    tensors=DEEPSEEK_TENSORS,
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
    mtp=MTP_BEHIND,
)

KIMI_K2 = dataclasses.replace(DEEPSEEK_V3, model_type="kimi_k2")
