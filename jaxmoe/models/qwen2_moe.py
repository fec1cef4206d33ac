"""Qwen2-MoE: biased queries, keys and values, softmax router, a shared expert behind a gate of its own."""

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
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.rotary import read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a qwen2_moe checkpoint."""
    hidden = pick(config, "hidden_size")
    activation = pick(config, "hidden_act", default="silu")
    dense = MLPConfig(hidden_size=hidden, intermediate_size=pick(config, "intermediate_size"), activation=activation)
    moe = MoEConfig(
        num_experts=pick(config, "num_experts", "num_local_experts"),
        num_experts_per_tok=pick(config, "num_experts_per_tok"),
        hidden_size=hidden,
        moe_intermediate_size=pick(config, "moe_intermediate_size"),
        activation=activation,
        router=RouterConfig(score="softmax", renormalize=pick(config, "norm_topk_prob", default=False)),
        shared=MLPConfig(
            hidden_size=hidden,
            intermediate_size=pick(config, "shared_expert_intermediate_size"),
            activation=activation,
        ),
        shared_gate=True,
    )
    dense_layers = pick(config, "mlp_only_layers", default=[])
    step = pick(config, "decoder_sparse_step", default=1)
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        layers=tuple(
            LayerConfig(attention=attention, feed_forward=dense if i in dense_layers or (i + 1) % step else moe)
            for i, attention in enumerate(_read_attention(config))
        ),
    )


def _read_attention(config: Mapping[str, Any]) -> list[AttentionConfig]:
    """The attention of each layer: with a window on every other one below `max_window_layers`, if with windows at all."""
    heads = pick(config, "num_attention_heads")
    head_dim = pick(config, "head_dim", default=pick(config, "hidden_size") // heads)
    window = pick(config, "sliding_window", default=4096) if config.get("use_sliding_window") else None
    below = pick(config, "max_window_layers", default=28)
    count = pick(config, "num_hidden_layers")
    usual = ["sliding_attention" if i % 2 == 0 and i < below else "full_attention" for i in range(count)]
    return [
        AttentionConfig(
            num_heads=heads,
            num_kv_heads=pick(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            rope=read_rope(config, head_dim=head_dim, default_theta=10000.0),
            bias=pick(config, "qkv_bias", default=True),
            sliding_window=window if kind == "sliding_attention" else None,
        )
        for kind in pick_layer_types(config, usual, "sliding_attention", "full_attention")
    ]


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            "layers.{layer}.moe.w_shared_gate": ("model.layers.{layer}.mlp.shared_expert_gate.weight",),
            **mlp_tensors("moe.shared", "mlp.shared_expert"),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
