"""OLMoE: query/key norms over all heads together, clipped projections, every layer sparse."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import AttentionConfig, DecoderConfig, LayerConfig, MoEConfig, RouterConfig, pick, read_common
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors
from jaxmoe.rotary import read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of an olmoe checkpoint."""
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
            qk_norm="full",
            bias=bias,
            out_bias=bias,
            clip=pick(config, "clip_qkv", default=None),
        ),
        feed_forward=MoEConfig(
            num_experts=pick(config, "num_experts", "num_local_experts"),
            num_experts_per_tok=pick(config, "num_experts_per_tok"),
            hidden_size=hidden,
            moe_intermediate_size=pick(config, "intermediate_size"),
            activation=pick(config, "hidden_act", default="silu"),
            router=RouterConfig(score="softmax", renormalize=pick(config, "norm_topk_prob", default=False)),
        ),
    )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5),
        layers=(layer,) * pick(config, "num_hidden_layers"),
    )


OLMOE = Family(
    model_type="olmoe",
    read_config=read_config,
    tensors=llama_tensors({"layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",)}),
    experts=MLP_EXPERTS,
    ignored=ROTARY_BUFFERS,
)
