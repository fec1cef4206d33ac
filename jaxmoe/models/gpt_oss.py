"""gpt-oss: attention sinks, every other layer with a window, experts with biases and a clamped SwiGLU."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    DecoderConfig,
    LayerConfig,
    MoEConfig,
    RouterConfig,
    SlidingWindow,
    pick,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors
from jaxmoe.models.readers import need_window, read_attention, read_biases, read_swiglu_limit
from jaxmoe.rotary import rope_settings

# What the family means where config.json gives no rope scaling.
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a gpt_oss checkpoint.

    Raises:
        ValueError: a setting is missing, or asks for a sigmoid factor that no released model has.
    """
    moe = MoEConfig(
        num_experts=pick(config, "num_local_experts", "num_experts"),
        num_experts_per_tok=pick(config, "num_experts_per_tok", "experts_per_token"),
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=pick(config, "intermediate_size"),
        activation="clamped_swiglu",
        activation_limit=read_swiglu_limit(config),
        bias=True,
        # A softmax over the chosen logits adds up to one already.
        router=RouterConfig(score="softmax", score_after_top_k=True, renormalize=False, logit_bias=True),
    )
    count = pick(config, "num_hidden_layers")
    usual = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    settings = rope_settings(config)

    def mask(kind: str) -> SlidingWindow | None:
        return need_window(config, default=128) if kind == "sliding_attention" else None

    return DecoderConfig(
        **read_common(config, norm_eps=1e-5, positions=131072),
        layers=tuple(
            LayerConfig(
                attention=read_attention(
                    config,
                    default_theta=150000.0,
                    rope=settings if settings.keys() & {"rope_type", "type"} else {**_YARN, **settings},
                    biases=read_biases(config, default=True),
                    sinks=True,
                    mask=mask(kind),
                ),
                feed_forward=moe,
            )
            for kind in pick_layer_types(config, usual, "sliding_attention", "full_attention")
        ),
    )


GPT_OSS = Family(
    model_type="gpt_oss",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.attention.sinks": ("model.layers.{layer}.self_attn.sinks",),
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.router.weight",),
            "layers.{layer}.moe.b_router": ("model.layers.{layer}.mlp.router.bias",),
        }
    ),
    experts=ExpertTensors(
        fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
        fused_down="model.layers.{layer}.mlp.experts.down_proj",
        fused_gate_up_bias="model.layers.{layer}.mlp.experts.gate_up_proj_bias",
        fused_down_bias="model.layers.{layer}.mlp.experts.down_proj_bias",
        fused_layout="fused_interleaved",
    ),
    ignored=ROTARY_BUFFERS,
)
