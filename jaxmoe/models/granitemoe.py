"""Granite-MoE: multipliers on embedding, scores, residual stream and logits; softmax over the chosen experts alone.

A checkpoint's experts are fused in either spelling: as released, or as transformers 5 holds them.
"""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, RouterConfig, pick, read_common
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors
from jaxmoe.models.readers import read_attention, read_biases, read_moe


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a granitemoe checkpoint."""
    layer = LayerConfig(
        attention=read_attention(
            config,
            default_theta=10000.0,
            biases=read_biases(config),
            scale=pick(config, "attention_multiplier", default=1.0),
        ),
        feed_forward=read_moe(
            config,
            "num_local_experts",
            "num_experts",
            width="intermediate_size",
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
