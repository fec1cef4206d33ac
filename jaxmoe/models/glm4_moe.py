"""GLM-4.5: sigmoid router with a correction bias, shared experts, rotation of half of each head, dense first layers."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, QueryKeyNorm, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, MTP_BEHIND, MTP_LAYERS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import (
    make_layers,
    read_attention,
    read_grouped_sigmoid_router,
    read_mlp,
    read_moe,
    sparse_from,
)
from jaxmoe.rotary import rope_settings


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a glm4_moe checkpoint."""
    attention = read_attention(
        config,
        default_theta=10000.0,
        partial=True,
        rope={"partial_rotary_factor": 0.5, **rope_settings(config)},
        qk_norm=QueryKeyNorm() if pick(config, "use_qk_norm", default=False) else None,
        biases="qkv" if pick(config, "attention_bias", default=False) else None,
    )
    shared_width = pick(config, "moe_intermediate_size") * pick(config, "n_shared_experts", default=1)
    moe = read_moe(
        config,
        "n_routed_experts",
        "num_experts",
        "num_local_experts",
        router=read_grouped_sigmoid_router(config),
        shared=read_mlp(config, shared_width),
    )
    dense = read_mlp(config, pick(config, "intermediate_size"))
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=make_layers(attention, sparse_from(config, first=1), moe, dense),
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=1),
    )


GLM4_MOE = Family(
    model_type="glm4_moe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            "layers.{layer}.moe.correction_bias": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            **mlp_tensors("moe.shared", "mlp.shared_experts"),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
    mtp=MTP_BEHIND,
)
