"""Qwen3-MoE: per-head query/key norms, softmax router, dense layers where the config says so."""

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
    read_common,
)
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors
from jaxmoe.rotary import read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a qwen3_moe checkpoint."""
    hidden = pick(config, "hidden_size")
    heads = pick(config, "num_attention_heads")
    head_dim = pick(config, "head_dim", default=hidden // heads)
    sliding = pick(config, "sliding_window", default=4096) if config.get("use_sliding_window") else None
    bias = pick(config, "attention_bias", default=False)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=pick(config, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        rope=read_rope(config, head_dim=head_dim, default_theta=10000.0),
        qk_norm="head",
        bias=bias,
        out_bias=bias,
        sliding_window=sliding,
    )
    activation = pick(config, "hidden_act", default="silu")
    dense = MLPConfig(hidden_size=hidden, intermediate_size=pick(config, "intermediate_size"), activation=activation)
    moe = MoEConfig(
        num_experts=pick(config, "num_experts", "num_local_experts"),
        num_experts_per_tok=pick(config, "num_experts_per_tok"),
        hidden_size=hidden,
        moe_intermediate_size=pick(config, "moe_intermediate_size"),
        activation=activation,
        router=RouterConfig(score="softmax", renormalize=pick(config, "norm_topk_prob", default=False)),
    )
    dense_layers = pick(config, "mlp_only_layers", default=[])
    step = pick(config, "decoder_sparse_step", default=1)
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        layers=tuple(
            LayerConfig(attention=attention, feed_forward=dense if i in dense_layers or (i + 1) % step else moe)
            for i in range(pick(config, "num_hidden_layers"))
        ),
    )


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            "layers.{layer}.mlp.w_gate": ("model.layers.{layer}.mlp.gate_proj.weight",),
            "layers.{layer}.mlp.w_up": ("model.layers.{layer}.mlp.up_proj.weight",),
            "layers.{layer}.mlp.w_down": ("model.layers.{layer}.mlp.down_proj.weight",),
        }
    ),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
