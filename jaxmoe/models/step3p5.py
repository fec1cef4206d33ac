"""Step-3.5-Flash, and the text part of Step-3.7-Flash: a gate for each head, layers with a window that have more heads.

Layers of the two kinds have rotations of their own, and the last ones have clamped experts.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    DecoderConfig,
    LayerConfig,
    MLPConfig,
    MoEConfig,
    QueryKeyNorm,
    RouterConfig,
    pick,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import MTP_LAYERS, ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import check_known, read_biases, read_limits, rope_of_kind, sparse_by_list, window_of
from jaxmoe.rotary import read_rope

_FULL, _SLIDING = "full_attention", "sliding_attention"
# The released files carry these; transformers reads none of them and so writes none.
_ONLY: dict[str, Any] = {
    "moe_router_activation": "sigmoid",
    "scoring_func": "sigmoid",
    "norm_expert_weight": True,
    "use_moe_router_bias": True,
    "use_qk_norm": True,
    "use_head_wise_attn_gate": True,
    "zero_centered": True,
    "n_shared_experts": 1,
}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a step3p5 checkpoint, as released or as transformers writes it.

    Raises:
        ValueError: a setting that the family's released models do not use.
    """
    check_known(config, **_ONLY)
    config = _own_layers(config)
    count = pick(config, "num_hidden_layers")
    kinds = pick_layer_types(config, [_FULL] * count, _FULL, _SLIDING)
    heads = _read_heads(config, kinds)
    limits = {name: read_limits(config, name) for name in ("swiglu_limits", "swiglu_limits_shared")}
    layers = []
    for i, sparse in enumerate(_sparse_layers(config)):
        of_every_token = limits["swiglu_limits_shared"][i]
        feed_forward = (
            _read_moe(config, limits["swiglu_limits"][i], of_every_token)
            if sparse
            else _read_mlp(config, pick(config, "intermediate_size"), of_every_token)
        )
        attention = _read_attention(config, kinds, i, heads[i])
        layers.append(LayerConfig(attention=attention, feed_forward=feed_forward))
    return DecoderConfig(
        **read_common(config, norm_eps=1e-5, positions=128000),
        norm="rms_zero_centered",
        layers=tuple(layers),
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=0),
    )


def _own_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same without the entries of lists that are for layers of multi-token prediction."""
    own = pick(config, "num_hidden_layers")
    behind = pick(config, "num_nextn_predict_layers", default=0)
    return {
        name: value[:own] if behind and isinstance(value, list) and len(value) == own + behind else value
        for name, value in config.items()
    }


def _sparse_layers(config: Mapping[str, Any]) -> list[bool]:
    """Whether each layer has routed experts, which released files say by their indices, joined with commas."""
    count, listed = pick(config, "num_hidden_layers"), config.get("moe_layers_enum")
    if listed is None:
        first = pick(config, "first_k_dense_replace", default=3)
        return sparse_by_list(config, [i >= first for i in range(count)])
    indices = listed.split(",") if isinstance(listed, str) else listed
    try:
        sparse = {int(index) for index in indices if str(index).strip()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"moe_layers_enum in config.json has the indices of layers; it is {listed!r:.80}") from error
    return sparse_by_list(config, [i in sparse for i in range(count)])


def _read_heads(config: Mapping[str, Any], kinds: list[str]) -> list[int]:
    """The query heads of each layer; those with a window may have a number of their own.

    Raises:
        ValueError: layers differ in something else.
    """
    usual = pick(config, "num_attention_heads")
    other = pick(config, "attention_other_setting", default={})
    sliding = pick(config, "num_sliding_attention_heads", default=pick(other, "num_attention_heads", default=usual))
    same = {
        "num_attention_groups": pick(config, "num_key_value_heads", "num_attention_groups", default=8),
        "head_dim": pick(config, "head_dim", default=128),
    }
    by_layer = pick(config, "per_layer_config", default={})
    for settings in (other, *(pick(by_layer, name, default={}) for name in by_layer)):
        differing = [name for name, value in same.items() if pick(settings, name, default=value) != value]
        if differing:
            raise ValueError(
                f"layers of step3p5 differ in num_attention_heads alone; config.json gives some another {differing[0]}"
            )
    if any(not name.isdigit() or int(name) >= len(kinds) for name in by_layer):
        raise ValueError(f"per_layer_config in config.json is by the index of a layer; it has {sorted(by_layer)!r:.80}")
    return [
        pick(pick(by_layer, str(i), default={}), "num_attention_heads", default=sliding if kind == _SLIDING else usual)
        for i, kind in enumerate(kinds)
    ]


def _read_attention(config: Mapping[str, Any], kinds: list[str], layer: int, heads: int) -> AttentionConfig:
    head_dim, kind = pick(config, "head_dim", default=128), kinds[layer]
    scalar = pick(config, "query_pre_attn_scalar", default=float(head_dim))
    if not 0 < scalar < math.inf:
        raise ValueError(f"query_pre_attn_scalar in config.json is above 0; it is {scalar}")
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=pick(config, "num_key_value_heads", "num_attention_groups", default=8),
        head_dim=head_dim,
        rope=read_rope(
            config, head_dim=head_dim, default_theta=10000.0, partial=True, rope=_rope_settings(config, kinds, layer)
        ),
        mask=window_of(pick(config, "sliding_window")) if kind == _SLIDING else None,
        qk_norm=QueryKeyNorm(weight="zero_centered"),
        biases=read_biases(config),
        scale=scalar**-0.5,
        head_gates=True,
    )


def _rope_settings(config: Mapping[str, Any], kinds: list[str], layer: int) -> dict[str, Any]:
    """The rotary settings of a layer: those of its kind, or entries of lists, where a scaling is of full layers alone."""
    kind = kinds[layer]
    by_kind = pick(config, "rope_parameters", default={})
    if by_kind:
        return rope_of_kind({**config, "rope_scaling": None}, kind, _FULL, _SLIDING)
    settings = {} if kind == _SLIDING else dict(pick(config, "rope_scaling", default={}))
    for name, listed in (("rope_theta", "rope_theta"), ("partial_rotary_factor", "partial_rotary_factors")):
        values = config.get(listed)
        if isinstance(values, list):
            if len(values) != len(kinds):
                raise ValueError(f"{listed} has a number for each of the {len(kinds)} layers; it has {len(values)}")
            settings[name] = values[layer]
        elif values is not None:
            settings[name] = values
    return settings


def _activation(config: Mapping[str, Any], limit: float | None) -> dict[str, Any]:
    """The fields of an activation with that limit."""
    name = pick(config, "hidden_act", default="silu")
    if limit is None:
        return {"activation": name}
    if name != "silu":
        raise ValueError(f"limits of step3p5 are of silu; config.json has hidden_act={name!r}")
    return {"activation": "capped_swiglu", "activation_limit": limit}


def _read_mlp(config: Mapping[str, Any], width: int, limit: float | None) -> MLPConfig:
    return MLPConfig(
        hidden_size=pick(config, "hidden_size"),
        intermediate_size=width,
        bias=pick(config, "mlp_bias", default=False),
        **_activation(config, limit),
    )


def _read_moe(config: Mapping[str, Any], limit: float | None, shared_limit: float | None) -> MoEConfig:
    return MoEConfig(
        num_experts=pick(
            config, "n_routed_experts", "moe_num_experts", "num_experts", "num_local_experts", default=288
        ),
        num_experts_per_tok=pick(config, "num_experts_per_tok", "moe_top_k", default=8),
        hidden_size=pick(config, "hidden_size"),
        moe_intermediate_size=pick(config, "moe_intermediate_size"),
        **_activation(config, limit),
        router=RouterConfig(
            score="sigmoid", correction_bias=True, scale=float(pick(config, "moe_router_scaling_factor", default=1.0))
        ),
        shared=_read_mlp(config, pick(config, "share_expert_dim", "share_expert_dims"), shared_limit),
    )


_LAYER = "model.layers.{layer}"


def _shared_tensors() -> dict[str, tuple[str, ...]]:
    released, theirs = (mlp_tensors("moe.shared", module) for module in ("share_expert", "mlp.shared_experts"))
    return {path: (*names, *theirs[path]) for path, names in released.items()}


STEP3P5 = Family(
    model_type="step3p5",
    read_config=read_config,
    tensors=llama_tensors(
        {
            "layers.{layer}.attention.w_head_gate": (f"{_LAYER}.self_attn.g_proj.weight",),
            "layers.{layer}.moe.w_router": (f"{_LAYER}.moe.gate.weight", f"{_LAYER}.mlp.gate.weight"),
            "layers.{layer}.moe.correction_bias": (
                f"{_LAYER}.moe.router_bias",
                f"{_LAYER}.mlp.gate.e_score_correction_bias",
            ),
            **_shared_tensors(),
            **mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=ExpertTensors(
        fused_gate=f"{_LAYER}.moe.gate_proj.weight",
        fused_up=f"{_LAYER}.moe.up_proj.weight",
        fused_down=f"{_LAYER}.moe.down_proj.weight",
        fused_layout="stacked",
    ),
    renamed_experts=ExpertTensors(
        fused_gate_up=f"{_LAYER}.mlp.experts.gate_up_proj",
        fused_down=f"{_LAYER}.mlp.experts.down_proj",
    ),
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
)
