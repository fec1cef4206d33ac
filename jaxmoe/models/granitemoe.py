"""Granite-MoE: multipliers on embedding, scores, residual stream and logits; softmax over the chosen experts alone.

A checkpoint's experts are fused in either spelling: as released, or as transformers 5 holds them.
"""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig, RouterConfig, pick, read_common
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors
from jaxmoe.rotary import read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a granitemoe checkpoint."""
    hidden = pick(config, "hidden_size")
    heads = pick(config, "num_attention_heads")
    head_dim = pick(config, "head_dim", default=hidden // heads)
    bias = pick(config, "attention_bias", default=False)
    layer = LayerConfig(
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=pick(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            rope=read_rope(config, head_dim=head_dim, default_theta=10000.0),
            bias=bias,
            out_bias=bias,
            scale=pick(config, "attention_multiplier", default=1.0),
        ),
        feed_forward=MoEConfig(
            num_experts=pick(config, "num_local_experts", "num_experts"),
            num_experts_per_tok=pick(config, "num_experts_per_tok"),
            hidden_size=hidden,
            moe_intermediate_size=pick(config, "intermediate_size"),
            activation=pick(config, "hidden_act", default="silu"),
            router=RouterConfig(score="softmax", score_after_top_k=True, renormalize=False),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        layers=(layer,) * pick(config, "num_hidden_layers"),
        embedding_multiplier=pick(config, "embedding_multiplier", default=1.0),
        residual_multiplier=pick(config, "residual_multiplier", default=1.0),
        logits_scaling=pick(config, "logits_scaling", default=1.0),
    )


GRANITEMOE = Family(
    model_type="granitemoe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": (
                "model.layers.{layer}.block_sparse_moe.router.layer.weight",
                "model.layers.{layer}.block_sparse_moe.router.weight",
            ),
        }
    ),
    experts=ExpertTensors(
        fused_gate_up="model.layers.{layer}.block_sparse_moe.input_linear.weight",
        fused_down="model.layers.{layer}.block_sparse_moe.output_linear.weight",
    ),
    renamed_experts=ExpertTensors(
        fused_gate_up="model.layers.{layer}.block_sparse_moe.experts.gate_up_proj",
        fused_down="model.layers.{layer}.block_sparse_moe.experts.down_proj",
    ),
    ignored=ROTARY_BUFFERS,
    spellings=(
        (".experts.gate_up_proj", ".input_linear.weight"),
        (".experts.down_proj", ".output_linear.weight"),
        (".router.weight", ".router.layer.weight"),
    ),
)
