"""Solar Open: GLM-4.5's router and experts in every layer, behind attention as in Llama."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import check_known, read_attention, read_grouped_sigmoid_router, read_mlp, read_moe


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a solar_open checkpoint.

    Raises:
        ValueError: a setting that the family's released models do not use.
    """
    # Of GLM-4.5's settings these are left, and transformers reads none of them.
    check_known(config, first_k_dense_replace=0, use_qk_norm=False, scoring_func="sigmoid", topk_method="noaux_tc")
    layer = LayerConfig(
        attention=read_attention(
            {"head_dim": 128, **config},
            default_theta=1e6,
            biases="qkv" if pick(config, "attention_bias", default=False) else None,
        ),
        feed_forward=read_moe(
            config,
            "n_routed_experts",
            "num_experts",
            "num_local_experts",
            router=read_grouped_sigmoid_router(config),
            shared=read_mlp(
                config, pick(config, "moe_intermediate_size") * pick(config, "n_shared_experts", default=1)
            ),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=(layer,) * pick(config, "num_hidden_layers"),
    )


SOLAR_OPEN = Family(
    model_type="solar_open",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            "layers.{layer}.moe.correction_bias": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            **mlp_tensors("moe.shared", "mlp.shared_experts"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
