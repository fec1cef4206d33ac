"""Llama 4, its text part: one sigmoid-weighted expert a token beside a shared one, attention in chunks.

Layers take turns: most rotate positions and attend within a chunk; every fourth or so has no position embedding, sees
everything, and makes its queries longer the farther they are from the start. The router's weight multiplies what goes
into an expert.
"""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    Chunks,
    DecoderConfig,
    MoEConfig,
    QueryKeyNorm,
    QueryTemperature,
    RouterConfig,
    pick,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import make_layers, read_biases, read_heads, read_mlp
from jaxmoe.rotary import read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a llama4_text checkpoint."""
    width = pick(config, "intermediate_size")
    moe = MoEConfig(
        num_experts=pick(config, "num_local_experts", "num_experts"),
        num_experts_per_tok=pick(config, "num_experts_per_tok", default=1),
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=width,
        activation=pick(config, "hidden_act", default="silu"),
        router=RouterConfig(score="sigmoid", score_after_top_k=True, renormalize=False),
        weights_on_input=True,
        shared=read_mlp(config, width),
    )
    dense = read_mlp(config, pick(config, "intermediate_size_mlp", default=16384))
    count = pick(config, "num_hidden_layers")
    step = pick(config, "interleave_moe_layer_step", default=1)
    moe_layers = pick(config, "moe_layers", default=range(step - 1, count, step))
    sparse = [i in moe_layers for i in range(count)]
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5), layers=make_layers(_read_attention(config, count), sparse, moe, dense)
    )


def _read_attention(config: Mapping[str, Any], count: int) -> list[AttentionConfig]:
    """The attention of each layer, with or without positions and chunks."""
    heads = read_heads(config)
    rope = read_rope(config, head_dim=heads["head_dim"], default_theta=500000.0, interleaved=True)
    qk_norm = QueryKeyNorm(weight="none", after_rope=True) if pick(config, "use_qk_norm", default=True) else None
    temperature = None
    if pick(config, "attn_temperature_tuning", default=True):
        floor, slope = pick(config, "floor_scale", default=8192), pick(config, "attn_scale", default=0.1)
        temperature = QueryTemperature(floor=float(floor), slope=float(slope))
    interval = pick(config, "no_rope_layer_interval", default=4)
    # 1 for a layer with positions, whatever the setting's name says; an empty list counts as none.
    rotates = pick(config, "no_rope_layers", default=[]) or [int((i + 1) % interval != 0) for i in range(count)]
    if len(rotates) < count:
        raise ValueError(f"no_rope_layers has a number for each of the {count} layers; it has {len(rotates)}")
    usual = ["chunked_attention" if rotate else "full_attention" for rotate in rotates[:count]]
    kinds = pick_layer_types(config, usual, "chunked_attention", "full_attention")
    chunk = pick(config, "attention_chunk_size", default=8192)
    return [
        AttentionConfig(
            **heads,
            rope=rope if rotate else None,
            qk_norm=qk_norm if rotate else None,
            biases=read_biases(config),
            mask=Chunks(size=chunk) if kind == "chunked_attention" else None,
            temperature=None if rotate else temperature,
        )
        for rotate, kind in zip(rotates[:count], kinds, strict=True)
    ]


LLAMA4_TEXT = Family(
    model_type="llama4_text",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.feed_forward.router.weight",),
            **mlp_tensors("moe.shared", "feed_forward.shared_expert"),
            **mlp_tensors("mlp", "feed_forward"),
        }
    ),
    experts=ExpertTensors(
        fused_gate_up="model.layers.{layer}.feed_forward.experts.gate_up_proj",
        fused_down="model.layers.{layer}.feed_forward.experts.down_proj",
        fused_layout="fused_transposed",
    ),
    ignored=ROTARY_BUFFERS,
)
