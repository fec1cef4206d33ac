"""Gemma 4, its text part: routed experts beside a dense MLP, a norm before and after each part.

Layers take turns: most attend within a window; every sixth or so sees everything, with wider and fewer heads of which
few dims rotate, and perhaps with its keys as values. Released multimodal models have this as their text part; those
with embeddings for every layer, or with layers that share keys and values, have no experts and are refused.
"""

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
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family, llama_tensors, mlp_tensors
from jaxmoe.models.readers import need_window, read_biases
from jaxmoe.rotary import read_rope

_SLIDING, _FULL = "sliding_attention", "full_attention"
# What the family means where config.json gives no rope settings.
_ROPE: dict[str, dict[str, Any]] = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    _FULL: {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
}
_LAYER_SETTINGS = {"head_dim", "num_key_value_heads"}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a gemma4_text checkpoint.

    Raises:
        ValueError: a setting is missing, or asks for a part that is not here.
    """
    _check_supported(config)
    hidden, eps = pick(config, "hidden_size"), pick(config, "rms_norm_eps", default=1e-6)
    activation = pick(config, "hidden_activation", default="gelu_pytorch_tanh")
    dense = MLPConfig(hidden_size=hidden, intermediate_size=pick(config, "intermediate_size"), activation=activation)
    moe = None
    if config.get("enable_moe_block"):
        moe = MoEConfig(
            num_experts=pick(config, "num_experts", "num_local_experts"),
            num_experts_per_tok=pick(config, "top_k_experts", "num_experts_per_tok"),
            hidden_size=hidden,
            moe_intermediate_size=pick(config, "moe_intermediate_size"),
            activation=activation,
            router=RouterConfig(score="softmax", expert_scale=True, input_norm_eps=eps),
        )
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6, tied=True),
        layers=tuple(
            LayerConfig(
                attention=attention,
                feed_forward=moe or dense,
                post_norms=True,
                parallel_mlp=dense if moe else None,
                output_scale=True,
            )
            for attention in _read_attention(config, pick(config, "num_hidden_layers"))
        ),
        norm="rms_float32",
        # A factor that is rounded to the model's dtype, as in the reference: 55.4256 is 55.5 in bfloat16.
        embedding_multiplier=hidden**0.5,
        logits_softcap=pick(config, "final_logit_softcapping", default=None),
    )


def _check_supported(config: Mapping[str, Any]) -> None:
    """Refuse the parts of the family that are not here, each by the name of its setting."""
    found = {
        # An absent number means 256 dims, a null or 0 none.
        "hidden_size_per_layer_input": config.get("hidden_size_per_layer_input", 256),
        "num_kv_shared_layers": config.get("num_kv_shared_layers"),
        "use_bidirectional_attention": config.get("use_bidirectional_attention") == "all",
    }
    unsupported = [f"{name}={config.get(name, 'absent')!r}" for name, value in found.items() if value]
    if unsupported:
        raise ValueError(
            "gemma4_text is loaded without embeddings for every layer (hidden_size_per_layer_input=0), with keys and "
            "values of its own in every layer (num_kv_shared_layers=0) and with causal attention; config.json asks for "
            f"{', '.join(unsupported)}"
        )


def _read_attention(config: Mapping[str, Any], count: int) -> list[AttentionConfig]:
    """The attention of each layer."""
    usual = [_FULL if (i + 1) % 6 == 0 else _SLIDING for i in range(count)]
    kinds = list(pick_layer_types(config, usual, _SLIDING, _FULL))
    kinds[-1] = _FULL  # as in the reference, whatever the list says
    ropes = {**_ROPE, **pick(config, "rope_parameters", default={})}
    keys_are_values = bool(config.get("attention_k_eq_v"))
    return [
        AttentionConfig(
            num_heads=pick(config, "num_attention_heads"),
            num_kv_heads=sizes["num_key_value_heads"],
            head_dim=sizes["head_dim"],
            rope=read_rope(
                config, head_dim=sizes["head_dim"], default_theta=_ROPE[kind]["rope_theta"], rope=ropes[kind]
            ),
            qk_norm=QueryKeyNorm(),
            v_norm=True,
            values_are_keys=keys_are_values and kind == _FULL,
            biases=read_biases(config),
            scale=1.0,
            mask=need_window(config, default=512) if kind == _SLIDING else None,
        )
        for kind, sizes in zip(kinds, _read_head_sizes(config, kinds), strict=True)
    ]


def _read_head_sizes(config: Mapping[str, Any], kinds: list[str]) -> list[dict[str, int]]:
    """The heads of each layer, which released files give by kind of layer, and transformers 5 layer by layer."""
    usual = {
        "head_dim": pick(config, "head_dim", default=256),
        "num_key_value_heads": pick(config, "num_key_value_heads"),
    }
    if config.get("per_layer_config") is None:
        full = {**usual, "head_dim": pick(config, "global_head_dim", default=512)}
        if config.get("attention_k_eq_v"):
            full["num_key_value_heads"] = pick(
                config, "num_global_key_value_heads", default=usual["num_key_value_heads"]
            )
        return [full if kind == _FULL else usual for kind in kinds]
    whole: dict[str, Any] = pick(config, "per_layer_config", default={})
    by_layer = [pick(whole, str(i), default={}) for i in range(len(kinds))]
    other = {name for own in by_layer for name in own} - _LAYER_SETTINGS
    if other:
        raise ValueError(
            f"layers of gemma4_text differ in {' and '.join(sorted(_LAYER_SETTINGS))}; per_layer_config has "
            f"{', '.join(sorted(other))} too"
        )
    return [{name: pick(own, name, default=size) for name, size in usual.items()} for own in by_layer]


def _norms() -> dict[str, tuple[str, ...]]:
    names = {
        "attention_post_norm": "post_attention_layernorm",
        "feed_forward_norm": "pre_feedforward_layernorm",
        "feed_forward_post_norm": "post_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm_1",
        "moe_norm": "pre_feedforward_layernorm_2",
        "moe_post_norm": "post_feedforward_layernorm_2",
    }
    return {
        f"layers.{{layer}}.{ours}.weight": (f"model.layers.{{layer}}.{name}.weight",) for ours, name in names.items()
    }


GEMMA4_TEXT = Family(
    model_type="gemma4_text",
    read_config=read_config,
    tensors=llama_tensors(
        {
            **_norms(),
            **mlp_tensors("mlp", "mlp"),
            "layers.{layer}.moe.w_router": ("model.layers.{layer}.router.proj.weight",),
            "layers.{layer}.moe.router_norm": ("model.layers.{layer}.router.scale",),
            "layers.{layer}.moe.expert_scale": ("model.layers.{layer}.router.per_expert_scale",),
            "layers.{layer}.output_scale": ("model.layers.{layer}.layer_scalar",),
        }
    ),
    experts=ExpertTensors(
        fused_gate_up="model.layers.{layer}.experts.gate_up_proj",
        fused_down="model.layers.{layer}.experts.down_proj",
    ),
    ignored=ROTARY_BUFFERS,
)
