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
    read_dtype,
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
        model_type=config["model_type"],
        vocab_size=pick(config, "vocab_size"),
        hidden_size=hidden,
        layers=(layer,) * pick(config, "num_hidden_layers"),
        norm_eps=pick(config, "rms_norm_eps", default=1e-5),
        tie_word_embeddings=pick(config, "tie_word_embeddings", default=False),
        max_position_embeddings=pick(config, "max_position_embeddings"),
        dtype=read_dtype(config),
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
