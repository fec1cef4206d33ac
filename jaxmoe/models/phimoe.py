"""Phi-3.5-MoE: sparsemixer router, layer norms, biases everywhere, LongRoPE.

Beyond the original context (``original_max_position_embeddings``) rotated queries and keys have another scale:

* a prompt longer than that has the long scale at all its positions, as in transformers;
* a sequence that grows beyond it has the long scale from its first token beyond on. Its cache stays: the keys in it keep
  the short scale. So does transformers' model where it is called with a cache token by token; its ``generate`` drops
  the cache at that token and computes the sequence anew with the long scale, and may give other tokens from there on.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig, RouterConfig, pick, read_common
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors
from jaxmoe.rotary import RopeConfig, read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a phimoe checkpoint."""
    hidden = pick(config, "hidden_size")
    heads = pick(config, "num_attention_heads")
    head_dim = pick(config, "head_dim", default=hidden // heads)
    bias = pick(config, "attention_bias", default=False)
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=pick(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            rope=_read_rope(config, head_dim),
            bias=bias,
            out_bias=bias,
            sliding_window=pick(config, "sliding_window", default=None),
        ),
        feed_forward=MoEConfig(
            num_experts=pick(config, "num_local_experts", "num_experts"),
            num_experts_per_tok=pick(config, "num_experts_per_tok", default=2),
            hidden_size=hidden,
            moe_intermediate_size=pick(config, "intermediate_size"),
            activation=pick(config, "hidden_act", default="silu"),
            router=RouterConfig(renormalize=False, sparsemixer=pick(config, "router_jitter_noise", default=0.01)),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=(layer,) * pick(config, "num_hidden_layers"),
        norm="layer",
        lm_head_bias=pick(config, "lm_head_bias", default=False),
    )


def _read_rope(config: Mapping[str, Any], head_dim: int) -> RopeConfig:
    rope = read_rope(config, head_dim=head_dim, default_theta=1e6)
    if rope.long is None:
        return rope
    # transformers 5 computes this family's frequencies without the sequence's length, so that beyond the original
    # context the scale is the long one and the frequencies stay the short ones. The model's own code changes both.
    return dataclasses.replace(rope, long=dataclasses.replace(rope.long, frequencies=rope.frequencies))


_NORM_BIASES = {
    "layers.{layer}.attention_norm.bias": ("model.layers.{layer}.input_layernorm.bias",),
    "layers.{layer}.feed_forward_norm.bias": ("model.layers.{layer}.post_attention_layernorm.bias",),
    "norm.bias": ("model.norm.bias",),
}

PHIMOE = Family(
    model_type="phimoe",
    read_config=read_config,
    # transformers 5 calls the block "mlp" and the gate "router" where it writes the experts fused.
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": (
                "model.layers.{layer}.block_sparse_moe.gate.weight",
                "model.layers.{layer}.mlp.router.weight",
            ),
            **_NORM_BIASES,
            "lm_head.bias": ("lm_head.bias",),
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
    spellings=((".mlp.router.", ".block_sparse_moe.gate."), (".mlp.", ".block_sparse_moe.")),
)
