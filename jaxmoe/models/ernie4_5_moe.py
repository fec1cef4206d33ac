"""ERNIE 4.5 MoE: softmax router with a correction bias, shared experts, dense layers around the sparse ones."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, MoEConfig, RouterConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import make_layers, read_attention, read_mlp


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of an ernie4_5_moe checkpoint."""
    bias = pick(config, "use_bias", default=False)
    width, shared = pick(config, "moe_intermediate_size"), pick(config, "moe_num_shared_experts", default=2)
    moe = MoEConfig(
        num_experts=pick(config, "moe_num_experts", "num_experts"),
        num_experts_per_tok=pick(config, "moe_k", "num_experts_per_tok"),
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=width,
        activation=pick(config, "hidden_act", default="silu"),
        router=RouterConfig(
            score="softmax",
            correction_bias=True,
            min_sum=pick(config, "moe_norm_min", default=1e-12),
        ),
        shared=read_mlp(config, width * shared, bias=bias) if shared else None,
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5, tied=True),
        layers=make_layers(
            read_attention(config, default_theta=500000.0, interleaved=True, biases="all" if bias else None),
            _sparse_layers(config),
            moe,
            read_mlp(config, pick(config, "intermediate_size"), bias=bias),
        ),
        lm_head_bias=bias,
    )


def _sparse_layers(config: Mapping[str, Any]) -> list[bool]:
    """Whether each layer has routed experts; those at both ends may be dense."""
    count = pick(config, "num_hidden_layers")
    start = pick(config, "moe_layer_start_index", default=1)
    end = pick(config, "moe_layer_end_index", default=-1)
    last = count - 1 if end == -1 else end
    step = pick(config, "moe_layer_interval", default=1)
    return [start <= i <= last and (i + 1) % step == 0 for i in range(count)]


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            # [1, E]; transformers 5 keeps it below the gate.
            "layers.{layer}.moe.correction_bias": (
                "model.layers.{layer}.mlp.moe_statics.e_score_correction_bias",
                "model.layers.{layer}.mlp.gate.moe_statics.e_score_correction_bias",
            ),
            **mlp_tensors("moe.shared", "mlp.shared_experts"),
            **mlp_tensors("mlp", "mlp"),
            "lm_head.bias": ("lm_head.bias",),
        }
    ),
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, "multi-token prediction": r"model\.mtp_.*"},
)
