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

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MoEConfig,
    RouterConfig,
    SparseMixer,
    pick,
    read_common,
)
from jaxmoe.models.family import BLOCK_SPARSE_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors
from jaxmoe.models.readers import read_attention, read_biases, read_window


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a phimoe checkpoint."""
    layer = LayerConfig(
        attention=_with_short_frequencies(
            read_attention(
                config,
                default_theta=1e6,
                biases=read_biases(config),
                mask=read_window(config, default=None),
            )
        ),
        feed_forward=MoEConfig(
            num_experts=pick(config, "num_local_experts", "num_experts"),
            num_experts_per_tok=pick(config, "num_experts_per_tok", default=2),
            hidden_size=pick(config, "hidden_size"),
            moe_intermediate_size=pick(config, "intermediate_size"),
            activation=pick(config, "hidden_act", default="silu"),
            router=RouterConfig(choice=SparseMixer(jitter=pick(config, "router_jitter_noise", default=0.01))),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=(layer,) * pick(config, "num_hidden_layers"),
        norm="layer",
        lm_head_bias=pick(config, "lm_head_bias", default=False),
    )


def _with_short_frequencies(attention: AttentionConfig) -> AttentionConfig:
    rope = attention.rope
    if rope is None or rope.long is None:
        return attention
    # transformers 5 computes this family's frequencies without the sequence's length, so that beyond the original
    # context the scale is the long one and the frequencies stay the short ones. The model's own code changes both.
    rope = dataclasses.replace(rope, long=dataclasses.replace(rope.long, frequencies=rope.frequencies))
    return dataclasses.replace(attention, rope=rope)


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
    experts=BLOCK_SPARSE_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
