"""Granite-MoE: multipliers on embedding, scores, residual stream and logits; softmax over the chosen experts alone.

A checkpoint's experts are fused in either spelling: as released, or as transformers 5 holds them. What granitemoeshared
and granitemoehybrid have besides is in files of their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
    RouterConfig,
    TokenMixerConfig,
    pick,
    read_common,
)
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors
from jaxmoe.models.readers import read_attention, read_biases, read_mlp, read_moe


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a granitemoe checkpoint."""
    attention = read_granite_attention(config)
    return read_granite(config, [attention] * pick(config, "num_hidden_layers"), read_granite_moe(config, shared=None))


def read_granite_attention(config: Mapping[str, Any]) -> AttentionConfig:
    """Read attention as in Llama, with a factor of its scores."""
    return read_attention(
        config,
        default_theta=10000.0,
        biases=read_biases(config),
        scale=pick(config, "attention_multiplier", default=1.0),
    )


def read_shared_mlp(config: Mapping[str, Any], *, default: int | None = None) -> MLPConfig | None:
    """Read the MLP of every token; it is None where its width is 0.

    Args:
        config: dictionary of config.json.
        default: width where config.json gives none; None where it has to.
    """
    if config.get("shared_intermediate_size") == 0:
        return None
    width = pick(config, "shared_intermediate_size", **({} if default is None else {"default": default}))
    return read_mlp(config, width)


def read_granite_moe(config: Mapping[str, Any], *, shared: MLPConfig | None) -> MoEConfig:
    """Read the routed experts, with `shared` beside them."""
    return read_moe(
        config,
        "num_local_experts",
        "num_experts",
        width="intermediate_size",
        router=RouterConfig(score="softmax", score_after_top_k=True, renormalize=False),
        shared=shared,
    )


def read_granite(
    config: Mapping[str, Any], mixers: Sequence[TokenMixerConfig], feed_forward: MoEConfig | MLPConfig
) -> DecoderConfig:
    """Read the settings that every Granite config.json has, around the token mixers of its layers."""
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        layers=tuple(LayerConfig(attention=mixer, feed_forward=feed_forward) for mixer in mixers),
        embedding_multiplier=pick(config, "embedding_multiplier", default=1.0),
        residual_multiplier=pick(config, "residual_multiplier", default=1.0),
        logits_scaling=pick(config, "logits_scaling", default=1.0),
    )


_LAYER = "model.layers.{layer}"


def shared_mlp_tensors(path: str) -> dict[str, tuple[str, ...]]:
    """Make the names of the MLP of every token, whose gate and up are one tensor, for the parameters at `path`."""
    joined = (f"{_LAYER}.shared_mlp.input_linear.weight",)
    return {
        f"layers.{{layer}}.{path}.w_gate": joined,
        f"layers.{{layer}}.{path}.w_up": joined,
        f"layers.{{layer}}.{path}.w_down": (f"{_LAYER}.shared_mlp.output_linear.weight",),
    }


GRANITEMOE = Family(
    model_type="granitemoe",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": (
                f"{_LAYER}.block_sparse_moe.router.layer.weight",
                f"{_LAYER}.block_sparse_moe.router.weight",
            ),
        }
    ),
    experts=ExpertTensors(
        fused_gate_up=f"{_LAYER}.block_sparse_moe.input_linear.weight",
        fused_down=f"{_LAYER}.block_sparse_moe.output_linear.weight",
    ),
    renamed_experts=ExpertTensors(
        fused_gate_up=f"{_LAYER}.block_sparse_moe.experts.gate_up_proj",
        fused_down=f"{_LAYER}.block_sparse_moe.experts.down_proj",
    ),
    ignored=ROTARY_BUFFERS,
)
