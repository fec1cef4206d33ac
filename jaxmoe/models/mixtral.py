"""Mixtral: softmax router that always renormalises, every layer sparse."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MoEConfig,
    RouterConfig,
    pick,
    read_common,
)
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors
from jaxmoe.rotary import read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a mixtral checkpoint."""
    hidden = pick(config, "hidden_size")
    heads = pick(config, "num_attention_heads")
    head_dim = pick(config, "head_dim", default=hidden // heads)
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=pick(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            rope=read_rope(config, head_dim=head_dim, default_theta=1e6),
            sliding_window=pick(config, "sliding_window", default=None),
        ),
        feed_forward=MoEConfig(
            num_experts=pick(config, "num_local_experts", "num_experts"),
            num_experts_per_tok=pick(config, "num_experts_per_tok"),
            hidden_size=hidden,
            moe_intermediate_size=pick(config, "intermediate_size"),
            activation=pick(config, "hidden_act", default="silu"),
            router=RouterConfig(score="softmax", renormalize=True),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=(layer,) * pick(config, "num_hidden_layers"),
    )


MIXTRAL = Family(
    model_type="mixtral",
    read_config=read_config,
    # transformers 5 names the block "mlp" where it writes the experts fused.
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": (
                "model.layers.{layer}.block_sparse_moe.gate.weight",
                "model.layers.{layer}.mlp.gate.weight",
            ),
        }
    ),
    experts=ExpertTensors(
        gate="model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        up="model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        down="model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
        fused_down="model.layers.{layer}.mlp.experts.down_proj",
    ),
    ignored=ROTARY_BUFFERS,
    spellings=((".mlp.", ".block_sparse_moe."),),
)
