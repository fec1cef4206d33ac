"""LongCat-Flash (Meituan): pairs of layers with latent attention, experts that run beside the second, and zero experts.

A layer of its config is two here, each with attention and a dense MLP. The routed experts see what the first MLP sees, and
their result is added behind the second. Some of what their router chooses from gives back its input.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, MLAConfig, MoEConfig, RouterConfig, pick, read_common
from jaxmoe.models.deepseek import read_mla
from jaxmoe.models.family import MLP_EXPERTS, ROTARY_BUFFERS, ZERO_EXPERTS, Family
from jaxmoe.models.readers import check_known, read_mlp


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a longcat_flash checkpoint.

    Raises:
        ValueError: a setting that the family's released models do not use, or halves of layers that are no pairs.
    """
    # The released files carry these; transformers reads none of them, or does the same with other values.
    check_known(
        config,
        attention_method="MLA",
        mla_scale_q_lora=True,
        mla_scale_kv_lora=True,
        zero_expert_type="identity",
        router_bias=False,
        norm_topk_prob=False,
        attention_bias=False,
    )
    moe = MoEConfig(
        num_experts=pick(config, "n_routed_experts", "num_local_experts"),
        num_experts_per_tok=pick(config, "moe_topk", "num_experts_per_tok"),
        zero_experts=pick(config, "zero_expert_num", default=256),
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=pick(config, "expert_ffn_hidden_size", "moe_intermediate_size"),
        activation=pick(config, "hidden_act", default="silu"),
        router=RouterConfig(
            score="softmax",
            correction_bias=True,
            renormalize=False,
            scale=float(pick(config, "routed_scaling_factor", default=6.0)),
        ),
    )
    dense = read_mlp(config, pick(config, "ffn_hidden_size", "intermediate_size"))
    attention = read_attention(config)
    pair = (
        LayerConfig(attention=attention, feed_forward=moe, shortcut_mlp=dense),
        LayerConfig(attention=attention, feed_forward=dense),
    )
    return DecoderConfig(**read_common(config, norm_eps=1e-5), layers=pair * _count_pairs(config))


def read_attention(config: Mapping[str, Any]) -> MLAConfig:
    """Read latent attention in which queries and latents are scaled as if their ranks were the model's width."""
    attention = read_mla(config, interleaved=True, default_theta=10_000_000.0)
    if attention.q_rank is None:
        raise ValueError("queries of longcat_flash are made from a latent; config.json has q_lora_rank=null")
    width = pick(config, "hidden_size")
    # Both parts of a query have the factor, and so have the scores.
    return dataclasses.replace(
        attention,
        scale=attention.scale * (width / attention.q_rank) ** 0.5,
        latent_scale=(width / attention.kv_rank) ** 0.5,
    )


def _count_pairs(config: Mapping[str, Any]) -> int:
    """The number of layers as config.json counts them, ``num_layers``; ``num_hidden_layers`` counts their halves."""
    if config.get("num_layers") is None:
        halves = pick(config, "num_hidden_layers")
        if halves % 2:
            raise ValueError(
                f"num_hidden_layers of longcat_flash counts two for each layer; it is {halves}; give num_layers"
            )
        return halves // 2
    layers = pick(config, "num_layers")
    if config.get("num_hidden_layers") not in (None, layers, 2 * layers):
        raise ValueError(
            f"num_hidden_layers of longcat_flash is num_layers, or twice that; they are {config['num_hidden_layers']!r:.40} "
            f"and {layers}"
        )
    return int(layers)


_LAYER, _HALF = "layers.{layer}", "model.layers.{pair}"
_ATTENTION = {
    "w_q_a": "q_a_proj.weight",
    "q_a_norm": "q_a_layernorm.weight",
    "w_q_b": "q_b_proj.weight",
    "w_kv_a": "kv_a_proj_with_mqa.weight",
    "kv_a_norm": "kv_a_layernorm.weight",
    "w_kv_b": "kv_b_proj.weight",
    "w_o": "o_proj.weight",
}


LONGCAT_FLASH = Family(
    model_type="longcat_flash",
    read_config=read_config,
    tensors={
        "embed.weight": ("model.embed_tokens.weight",),
        **{f"{_LAYER}.attention.{part}": (f"{_HALF}.self_attn.{{half}}.{name}",) for part, name in _ATTENTION.items()},
        f"{_LAYER}.attention_norm.weight": (f"{_HALF}.input_layernorm.{{half}}.weight",),
        f"{_LAYER}.feed_forward_norm.weight": (f"{_HALF}.post_attention_layernorm.{{half}}.weight",),
        **{f"{_LAYER}.mlp.w_{part}": (f"{_HALF}.mlps.{{half}}.{part}_proj.weight",) for part in ("gate", "up", "down")},
        f"{_LAYER}.moe.w_router": (f"{_HALF}.mlp.router.classifier.weight",),
        f"{_LAYER}.moe.correction_bias": (f"{_HALF}.mlp.router.e_score_correction_bias",),
        "norm.weight": ("model.norm.weight",),
        "lm_head.weight": ("lm_head.weight",),
    },
    experts=MLP_EXPERTS.map(lambda name: name.replace("{layer}", "{pair}")),
    ignored={
        **ROTARY_BUFFERS,
        "multi-token prediction": r"model\.mtp\..*",
        # transformers makes gate and up for zero experts too, and reads none of them.
        "zero experts": rf"model\.layers\.\d+\.mlp\.experts\.({ZERO_EXPERTS})\.(gate|up)_proj\.weight",
        "rows of zero experts": r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj\[rest\]",
    },
    padded_experts=r"model\.layers\.\d+\.mlp\.experts\.gate_up_proj",
    # Fused, it reads gate and up alone that have rows for zero experts, of which no model here has values.
    written="per_expert",
)
