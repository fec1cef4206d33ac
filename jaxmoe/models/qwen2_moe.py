"""Qwen2-MoE: biased queries, keys and values, softmax router, a shared expert behind a gate of its own."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import AttentionConfig, DecoderConfig, pick, pick_layer_types, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import (
    make_layers,
    read_attention,
    read_mlp,
    read_moe_with_gated_expert,
    read_window,
    sparse_by_step,
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a qwen2_moe checkpoint."""
    moe = read_moe_with_gated_expert(config, renormalize=pick(config, "norm_topk_prob", default=False))
    dense = read_mlp(config, pick(config, "intermediate_size"))
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        layers=make_layers(_read_attention(config), sparse_by_step(config), moe, dense),
    )


def _read_attention(config: Mapping[str, Any]) -> list[AttentionConfig]:
    """The attention of each layer: with a window on every other one below `max_window_layers`, if with windows at all."""
    window = read_window(config, default=4096) if config.get("use_sliding_window") else None
    below = pick(config, "max_window_layers", default=28)
    count = pick(config, "num_hidden_layers")
    usual = ["sliding_attention" if i % 2 == 0 and i < below else "full_attention" for i in range(count)]
    return [
        read_attention(
            config,
            default_theta=10000.0,
            biases="qkv" if pick(config, "qkv_bias", default=True) else None,
            mask=window if kind == "sliding_attention" else None,
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
