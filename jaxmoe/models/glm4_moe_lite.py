"""GLM-4.7-Flash: GLM-4.5's router and experts behind DeepSeek's latent attention."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, pick
from jaxmoe.models.deepseek import DEEPSEEK_TENSORS, check_setting, read_deepseek, read_mla
from jaxmoe.models.family import MLP_EXPERTS, MTP_BEHIND, MTP_LAYERS, ROTARY_BUFFERS, Family
from jaxmoe.models.readers import read_grouped_sigmoid_router


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a glm4_moe_lite checkpoint.

    Raises:
        ValueError: it asks for another score or another choice of experts than the family has.
    """
    check_setting(config, "topk_method", "noaux_tc")
    check_setting(config, "scoring_func", "sigmoid")
    return read_deepseek(
        config,
        attention=read_mla({"q_lora_rank": 768, **config}, interleaved=pick(config, "rope_interleave", default=True)),
        router=read_grouped_sigmoid_router(config, scale=1.8),
        shared_experts=1,
        first_sparse=1,
        norm_eps=1e-5,
        num_mtp_layers=pick(config, "num_nextn_predict_layers", "num_mtp_layers", default=1),
    )


GLM4_MOE_LITE = Family(
    model_type="glm4_moe_lite",
    read_config=read_config,
    tensors=DEEPSEEK_TENSORS,
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
    mtp=MTP_BEHIND,
)
