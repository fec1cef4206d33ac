"""Ling 3: Kimi delta attention with bounded decays, latent attention with gated heads now and then, DeepSeek's MoE."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    DecoderConfig,
    KDAConfig,
    LayerConfig,
    MLAConfig,
    MoEConfig,
    TokenMixerConfig,
    pick,
    pick_layer_types,
)
from jaxmoe.models.deepseek import DEEPSEEK_TENSORS, check_setting, read_deepseek, read_mla
from jaxmoe.models.family import MLP_EXPERTS, MTP_LAYERS, ROTARY_BUFFERS, Family
from jaxmoe.models.kimi_linear import as_deepseek, gate_tensors
from jaxmoe.models.readers import check_known, read_grouped_sigmoid_router, read_limits

_LINEAR, _FULL = "linear_attention", "full_attention"

# Settings of released files that transformers does not look at, with the only values that it computes.
_ONLY: dict[str, Any] = {
    "gated_attention_proj_granularity_type": "head_wise",
    "linear_attention": "kda",
    "moe_router_enable_expert_bias": True,
    "no_kda_lora": True,
    "rope_interleave": True,
    "scale_router_input": False,
    "up_proj_norm": False,
    "use_bias": False,
    "use_kda_lora": False,
    "use_mla_nope": False,
    "use_nGPT": False,
    "use_qkv_bias": False,
    "value_norm": False,
}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a bailing_hybrid checkpoint.

    The publisher's engine clamps the activations of experts where ``expert_swiglu_limit_list`` and
    ``share_expert_swiglu_limit_list`` say so, which transformers does not look at; here they count.

    Raises:
        ValueError: a setting is missing, contradicts another, or asks for what the family does not have.
    """
    config = as_deepseek(config)
    _check_settings(config)
    kinds: dict[str, TokenMixerConfig] = {_LINEAR: _read_kda(config), _FULL: _read_full_attention(config)}
    decoder = read_deepseek(
        config,
        attention=[kinds[kind] for kind in _read_kinds(config)],
        router=read_grouped_sigmoid_router(config, num_groups=8, topk_groups=4, scale=2.5),
        shared_experts=1,
        first_sparse=2,
        num_mtp_layers=pick(config, "num_nextn_predict_layers", "num_mtp_layers", default=1),
    )
    return dataclasses.replace(decoder, layers=_with_limits(config, decoder.layers))


def _check_settings(config: Mapping[str, Any]) -> None:
    older = [name for name in pick(config, "architectures", default=[]) if str(name).startswith("BailingMoeV2")]
    if older:
        raise ValueError(
            f"bailing_hybrid is known as Ling 3 has it, with Kimi delta attention; config.json is of {older[0]}, whose "
            "layers have lightning attention"
        )
    check_known(config, **_ONLY)
    check_setting(config, "scoring_func", "sigmoid")
    check_setting(config, "score_function", "sigmoid")
    check_setting(config, "topk_method", "noaux_tc")
    width = pick(config, "moe_intermediate_size")
    if pick(config, "moe_shared_expert_intermediate_size", default=width) != width:
        raise ValueError(
            f"shared experts of bailing_hybrid are as wide as routed ones: moe_intermediate_size={width} and "
            f"moe_shared_expert_intermediate_size={config['moe_shared_expert_intermediate_size']}"
        )


def _read_full_attention(config: Mapping[str, Any]) -> MLAConfig:
    settings = dict(pick(config, "rope_parameters", default={}))
    config = {"q_lora_rank": None, "rope_theta": 6e6, **config, "rope_parameters": settings}
    for place in (config, settings):
        # Released files have the part of head_dim, that of a recurrent layer, which qk_rope_head_dim is.
        part = place.get("partial_rotary_factor")
        if type(part) in (int, float) and part * pick(config, "head_dim", default=128) == config.get(
            "qk_rope_head_dim"
        ):
            del place["partial_rotary_factor"]
    return dataclasses.replace(read_mla(config, interleaved=True), head_gates=True)


def _read_kda(config: Mapping[str, Any]) -> KDAConfig:
    # Where transformers has written config.json head_dim is that of what rotates, and these have names of their own.
    bounded = pick(config, "kda_safe_gate", default=True)
    return KDAConfig(
        num_heads=pick(config, "linear_num_heads", default=pick(config, "num_attention_heads")),
        head_dim=pick(config, "linear_head_dim", default=pick(config, "head_dim", default=128)),
        conv_kernel_size=pick(config, "linear_conv_kernel_dim", "short_conv_kernel_size", default=4),
        activation=pick(config, "hidden_act", default="silu"),
        least_log_decay=float(pick(config, "kda_lower_bound", default=-5.0)) if bounded else None,
    )


def _read_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kind of each layer; without a list the last one of every group is attention."""
    count, group = pick(config, "num_hidden_layers"), pick(config, "layer_group_size", default=6)
    if config.get("layer_types") is None and (group < 1 or count % group):
        raise ValueError(
            f"layers come in whole groups, the last one of each with attention: num_hidden_layers={count} and "
            f"layer_group_size={group}; list layer_types for another order"
        )
    usual = [_LINEAR if (i + 1) % max(group, 1) else _FULL for i in range(count)]
    return pick_layer_types(config, usual, _LINEAR, _FULL)


def _with_limits(config: Mapping[str, Any], layers: tuple[LayerConfig, ...]) -> tuple[LayerConfig, ...]:
    """The layers with limits of their experts' activations; lists may go on for multi-token prediction."""
    routed, shared = (
        read_limits({**config, name: pick(config, name, default=[])[: len(layers)] or None}, name)
        for name in ("expert_swiglu_limit_list", "share_expert_swiglu_limit_list")
    )
    return tuple(
        dataclasses.replace(layer, feed_forward=_limited(layer, routed[i], shared[i]))
        if routed[i] or shared[i]
        else layer
        for i, layer in enumerate(layers)
    )


def _limited(layer: LayerConfig, routed: float | None, shared: float | None) -> MoEConfig:
    moe = layer.feed_forward
    if not isinstance(moe, MoEConfig) or moe.activation != "silu":
        raise ValueError(
            "limits of bailing_hybrid's activations are of experts with silu; config.json gives one to a dense layer, or "
            "another hidden_act"
        )
    if shared and moe.shared is not None:
        of_every_token = dataclasses.replace(moe.shared, activation="capped_swiglu", activation_limit=shared)
        moe = dataclasses.replace(moe, shared=of_every_token)
    return dataclasses.replace(moe, activation="capped_swiglu", activation_limit=routed) if routed else moe


_LAYER = "model.layers.{layer}"
_KDA_NAMES = {
    **{f"w_{part}": f"{part}_proj.weight" for part in "bg"},
    "out_norm": "o_norm.weight",
    "w_out": "o_proj.weight",
}


def _released(name: str) -> str:
    """The publisher's name for a tensor that transformers calls `name`."""
    for theirs, own in (
        ("model.embed_tokens.", "model.word_embeddings."),
        (".self_attn.o_proj.", ".attention.dense."),
        (".self_attn.", ".attention."),
        (".forget_gate.", "."),
        (".gate.e_score_correction_bias", ".gate.expert_bias"),
    ):
        name = name.replace(theirs, own)
    return name


_THEIRS = {
    **{path: names[0] for path, names in DEEPSEEK_TENSORS.items()},
    **{
        f"layers.{{layer}}.attention.{path}": f"{_LAYER}.self_attn.{name}"
        for path, name in (
            *_KDA_NAMES.items(),
            *((path, f"forget_gate.{name}") for path, name in gate_tensors("f").items()),
            ("w_head_gate", "g_proj.weight"),
        )
    },
}

BAILING_HYBRID = Family(
    model_type="bailing_hybrid",
    read_config=read_config,
    tensors={
        **{path: tuple(dict.fromkeys((_released(name), name))) for path, name in _THEIRS.items()},
        **{
            f"layers.{{layer}}.attention.conv_{part}": (
                f"{_LAYER}.attention.{part}_conv1d.weight",
                f"{_LAYER}.self_attn.conv1d.weight",
            )
            for part in "qkv"
        },
    },
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
)
