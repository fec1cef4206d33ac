"""MiMo-V2-Flash: layers with a window and attention sinks between full ones, values narrower than keys.

Layers of the two kinds have heads and rotations of their own. Xiaomi 2026 (arXiv:2601.02780).
"""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    SlidingWindow,
    pick,
    pick_layer_flags,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import (
    MLP_EXPERTS,
    MTP_RULE,
    ROTARY_BUFFERS,
    Family,
    MTPTensors,
    llama_tensors,
    mlp_tensors,
)
from jaxmoe.models.readers import (
    check_known,
    make_layers,
    read_grouped_sigmoid_router,
    read_mlp,
    read_moe,
    rope_of_kind,
    sparse_by_list,
)
from jaxmoe.rotary import read_rope

_SLIDING, _FULL = "sliding_attention", "full_attention"
_THETAS = {_SLIDING: ("swa_rope_theta", 10000.0), _FULL: ("rope_theta", 5000000.0)}
_ROTATING = 0.334


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a mimo_v2_flash checkpoint, as released or as transformers writes it.

    Raises:
        ValueError: a setting is missing, or asks for what no released model has.
    """
    # The released files carry these; transformers reads none of them.
    check_known(config, topk_method="noaux_tc", scoring_func="sigmoid", n_shared_experts=0)
    attention = {kind: _read_attention(config, kind) for kind in (_SLIDING, _FULL)}
    moe = read_moe(config, "n_routed_experts", "num_local_experts", router=read_grouped_sigmoid_router(config))
    return DecoderConfig(
        **read_common(config, norm_eps=pick(config, "layernorm_epsilon", default=1e-5)),
        layers=make_layers(
            [attention[kind] for kind in _layer_kinds(config)],
            sparse_by_list(config, [i > 0 for i in range(pick(config, "num_hidden_layers"))]),
            moe,
            read_mlp(config, pick(config, "intermediate_size")),
        ),
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=3),
    )


def _layer_kinds(config: Mapping[str, Any]) -> list[str]:
    """The kind of attention of each layer, which released files give as numbers, 1 for a window."""
    usual = [i > 0 and (i + 1) % 6 > 0 for i in range(pick(config, "num_hidden_layers"))]
    windows = pick_layer_flags(config, "hybrid_layer_pattern", usual)
    return pick_layer_types(config, [_SLIDING if window else _FULL for window in windows], _SLIDING, _FULL)


def _read_attention(config: Mapping[str, Any], kind: str) -> AttentionConfig:
    """The attention of the layers of a kind; those with a window have sizes of their own, in released files ``swa_...``."""
    sliding = kind == _SLIDING
    sizes = {
        "num_attention_heads": pick(config, "num_attention_heads"),
        # Only released files give the other kind's number, which then is twice as many.
        "num_key_value_heads": pick(config, "num_key_value_heads") * (2 if sliding else 1),
        "head_dim": pick(config, "head_dim", default=192),
        "v_head_dim": pick(config, "v_head_dim", default=128),
    }
    if sliding:
        sizes = {name: pick(config, f"swa_{name}", default=size) for name, size in sizes.items()}
    sinks = pick(config, f"add_{'swa' if sliding else 'full'}_attention_sink_bias", default=sliding)
    return AttentionConfig(
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        v_head_dim=sizes["v_head_dim"],
        rope=read_rope(
            config,
            head_dim=sizes["head_dim"],
            default_theta=_THETAS[kind][1],
            partial=True,
            rope=_rope_settings(config, kind),
        ),
        mask=SlidingWindow(size=_window(config)) if sliding else None,
        biases="qkv" if pick(config, "attention_bias", default=False) else None,
        # null means values as they are, which a missing setting does not.
        value_scale=pick(config, "attention_value_scale", default=None if "attention_value_scale" in config else 0.707),
        sinks=sinks,
    )


def _rope_settings(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The rotary settings of a kind of layer, which transformers writes one beside the other and prefers."""
    name, theta = _THETAS[kind]
    return {
        "rope_theta": pick(config, name, default=theta),
        "partial_rotary_factor": pick(config, "partial_rotary_factor", default=_ROTATING),
        **rope_of_kind(config, kind, *_THETAS),
    }


def _window(config: Mapping[str, Any]) -> int:
    """Positions that a token sees with its own; ``sliding_window_size`` counts those before it.

    Raises:
        ValueError: the two settings say different things.
    """
    before = pick(config, "sliding_window_size", default=None)
    if before is None:
        return pick(config, "sliding_window", default=129)
    size = pick(config, "sliding_window_size") + 1
    # Released files give the same number for both.
    if pick(config, "sliding_window", default=size) not in (size - 1, size):
        raise ValueError(
            f"sliding_window_size and sliding_window in config.json are of one window; they are {before} and "
            f"{config['sliding_window']}"
        )
    return size


def _prediction_layers(config: Mapping[str, Any], decoder: DecoderConfig) -> list[LayerConfig]:
    """The layers for multi-token prediction, of which config.json says nothing: with a window, and dense."""
    dense = read_mlp(config, pick(config, "intermediate_size"))
    layer = LayerConfig(attention=_read_attention(config, _SLIDING), feed_forward=dense)
    return [layer] * decoder.num_mtp_layers


_PREDICTION = "model.mtp.layers.{mtp}"

MIMO_V2_FLASH = Family(
    model_type="mimo_v2_flash",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.attention.sinks": (
                "model.layers.{layer}.self_attn.attention_sink_bias",
                "model.layers.{layer}.self_attn.sinks",
            ),
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.mlp.gate.weight",),
            "layers.{layer}.moe.correction_bias": ("model.layers.{layer}.mlp.gate.e_score_correction_bias",),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, MTP_RULE: r"model\.mtp\..*"},
    mtp=MTPTensors(
        layers=_prediction_layers,
        layer=_PREDICTION,
        renamed=(("post_attention_layernorm", "pre_mlp_layernorm"),),
        tensors={
            "layers.{layer}.prediction.embed_norm.weight": (f"{_PREDICTION}.enorm.weight",),
            "layers.{layer}.prediction.hidden_norm.weight": (f"{_PREDICTION}.hnorm.weight",),
            "layers.{layer}.prediction.w_in": (f"{_PREDICTION}.eh_proj.weight",),
            "layers.{layer}.prediction.out_norm.weight": (f"{_PREDICTION}.final_layernorm.weight",),
        },
        passes="main",
    ),
)
