"""LFM2-MoE: gated short convolutions with an attention layer now and then, dense layers first, a sigmoid router."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    DecoderConfig,
    QueryKeyNorm,
    RouterConfig,
    ShortConvConfig,
    TokenMixerConfig,
    pick,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors
from jaxmoe.models.readers import make_layers, read_attention, read_mlp, read_moe


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of an lfm2_moe checkpoint.

    Raises:
        ValueError: a setting is missing, or asks for a kind of layer that is not known here.
    """
    count = pick(config, "num_hidden_layers")
    if config.get("layer_types") is None:
        raise ValueError("config.json of lfm2_moe needs layer_types, the kind of each layer; it is not there")
    kinds: dict[str, TokenMixerConfig] = {
        "conv": ShortConvConfig(
            width=pick(config, "hidden_size"),
            conv_kernel_size=pick(config, "conv_L_cache", default=3),
            bias=pick(config, "conv_bias", default=False),
        ),
        "full_attention": read_attention(config, default_theta=1e6, qk_norm=QueryKeyNorm()),
    }
    router = RouterConfig(
        score="sigmoid",
        correction_bias=pick(config, "use_expert_bias", default=True),
        renormalize=pick(config, "norm_topk_prob", default=True),
        sum_epsilon=1e-6,
        scale=float(pick(config, "routed_scaling_factor", default=1.0)),
    )
    dense = pick(config, "num_dense_layers", default=2)
    common = read_common(config, norm_eps=pick(config, "norm_eps", default=1e-5), tied=True)
    # Where both are there it is the older spelling that transformers takes.
    tied = pick(config, "tie_embedding", default=common["tie_word_embeddings"])
    return DecoderConfig(
        **{**common, "tie_word_embeddings": tied},
        layers=make_layers(
            [kinds[kind] for kind in pick_layer_types(config, [""] * count, *kinds)],
            [i >= dense for i in range(count)],
            read_moe(config, "num_experts", "num_local_experts", router=router),
            read_mlp(config, pick(config, "intermediate_size")),
        ),
    )


_LAYER = "model.layers.{layer}"
_FEED_FORWARD = f"{_LAYER}.feed_forward"

_NAMES = {
    "attention_norm.weight": "operator_norm.weight",
    "feed_forward_norm.weight": "ffn_norm.weight",
    "attention.q_norm": "self_attn.q_layernorm.weight",
    "attention.k_norm": "self_attn.k_layernorm.weight",
    "attention.w_o": "self_attn.out_proj.weight",
    # The projection in is one tensor, and its parts lie in this order.
    **{f"attention.w_in_{part}": "conv.in_proj.weight" for part in "bcx"},
    **{f"attention.b_in_{part}": "conv.in_proj.bias" for part in "bcx"},
    "attention.conv": "conv.conv.weight",
    "attention.b_conv": "conv.conv.bias",
    "attention.w_out": "conv.out_proj.weight",
    "attention.b_out": "conv.out_proj.bias",
    "mlp.w_gate": "feed_forward.w1.weight",
    "mlp.w_up": "feed_forward.w3.weight",
    "mlp.w_down": "feed_forward.w2.weight",
    "moe.w_router": "feed_forward.gate.weight",
    "moe.correction_bias": "feed_forward.expert_bias",
}

LFM2_MOE = Family(
    model_type="lfm2_moe",
    read_config=read_config,
    tensors={
        **llama_tensors({f"layers.{{layer}}.{path}": (f"{_LAYER}.{name}",) for path, name in _NAMES.items()}),
        "norm.weight": ("model.embedding_norm.weight",),
    },
    experts=ExpertTensors(
        gate=f"{_FEED_FORWARD}.experts.{{expert}}.w1.weight",
        up=f"{_FEED_FORWARD}.experts.{{expert}}.w3.weight",
        down=f"{_FEED_FORWARD}.experts.{{expert}}.w2.weight",
        fused_gate_up=f"{_FEED_FORWARD}.experts.gate_up_proj",
        fused_down=f"{_FEED_FORWARD}.experts.down_proj",
    ),
    ignored=ROTARY_BUFFERS,
)
