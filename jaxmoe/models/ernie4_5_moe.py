"""ERNIE 4.5 MoE: softmax router with a correction bias, shared experts, dense layers around the sparse ones."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
    RouterConfig,
    pick,
    read_dtype,
)
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.rotary import read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of an ernie4_5_moe checkpoint."""
    hidden = pick(config, "hidden_size")
    heads = pick(config, "num_attention_heads")
    head_dim = pick(config, "head_dim", default=hidden // heads)
    bias = pick(config, "use_bias", default=False)
    tied = pick(config, "tie_word_embeddings", default=True)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=pick(config, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        rope=read_rope(config, head_dim=head_dim, default_theta=500000.0, interleaved=True),
        bias=bias,
        out_bias=bias,
    )
    activation = pick(config, "hidden_act", default="silu")

    def mlp(width: int) -> MLPConfig:
        return MLPConfig(hidden_size=hidden, intermediate_size=width, activation=activation, bias=bias)

    width, shared = pick(config, "moe_intermediate_size"), pick(config, "moe_num_shared_experts", default=2)
    moe = MoEConfig(
        num_experts=pick(config, "moe_num_experts", "num_experts"),
        num_experts_per_tok=pick(config, "moe_k", "num_experts_per_tok"),
        hidden_size=hidden,
        moe_intermediate_size=width,
        activation=activation,
        router=RouterConfig(
            score="softmax",
            correction_bias=True,
            min_sum=pick(config, "moe_norm_min", default=1e-12),
        ),
        shared=mlp(width * shared) if shared else None,
    )
    count = pick(config, "num_hidden_layers")
    start = pick(config, "moe_layer_start_index", default=1)
    end = pick(config, "moe_layer_end_index", default=-1)
    last = count - 1 if end == -1 else end
    step = pick(config, "moe_layer_interval", default=1)
    dense = mlp(pick(config, "intermediate_size"))
    return DecoderConfig(
        model_type=config["model_type"],
        vocab_size=pick(config, "vocab_size"),
        hidden_size=hidden,
        layers=tuple(
            LayerConfig(attention=attention, feed_forward=moe if start <= i <= last and (i + 1) % step == 0 else dense)
            for i in range(count)
        ),
        norm_eps=pick(config, "rms_norm_eps", default=1e-5),
        tie_word_embeddings=tied,
        max_position_embeddings=pick(config, "max_position_embeddings"),
        dtype=read_dtype(config),
        lm_head_bias=bias,
    )


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
