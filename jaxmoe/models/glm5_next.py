"""GLM-5.3-Flash, the text model: Kimi delta attention, latent attention to chosen pools of keys, and several streams."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AveragedStreamsConfig,
    DecoderConfig,
    IndexerConfig,
    LayerConfig,
    MLAConfig,
    MoEConfig,
    TokenMixerConfig,
    check_equal,
    pick,
    pick_layer_types,
)
from jaxmoe.models.deepseek import read_deepseek, read_mla
from jaxmoe.models.deepseek_v32 import DEEPSEEK_V32, read_indexer_types
from jaxmoe.models.family import MLP_EXPERTS, MTP_LAYERS, ROTARY_BUFFERS, Family
from jaxmoe.models.kimi_linear import KIMI_LINEAR, read_kda
from jaxmoe.models.readers import check_known, read_grouped_sigmoid_router

_LINEAR, _INDEXED, _RELEASED = "linear_attention", "indexed_attention", "full_attention"
_EPS = 1e-5


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a glm5_next_text checkpoint.

    Raises:
        ValueError: a setting is missing, contradicts another, or asks for what the family does not have.
    """
    check_known(
        config,
        hidden_act="silu",
        qk_rope_head_dim=0,
        num_key_value_heads=pick(config, "num_attention_heads"),
        # Without it a token that no pool ends before would attend to nothing.
        index_kpool_always_select_tail=True,
    )
    model = read_deepseek(
        config,
        attention=_read_token_mixers(config),
        router=read_grouped_sigmoid_router(config, scale=2.5),
        shared_experts=1,
        first_sparse=3,
        norm_eps=_EPS,
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=1),
    )
    limit = pick(config, "swiglu_limit", default=10.0)
    streams = AveragedStreamsConfig(
        streams=pick(config, "hc_mult", default=4),
        iterations=pick(config, "hc_sinkhorn_iters", default=20),
        eps=pick(config, "hc_eps", default=1e-6),
    )
    return dataclasses.replace(model, layers=tuple(_limited(layer, limit) for layer in model.layers), streams=streams)


def _read_token_mixers(config: Mapping[str, Any]) -> list[TokenMixerConfig]:
    full = _read_attention(config)
    assert full.indexer is not None
    shared = dataclasses.replace(full, indexer=dataclasses.replace(full.indexer, reuses=True))
    linear = read_kda(config, num_heads=64, least_log_decay=_read_bound(config))
    usual = [_INDEXED if i % 4 == 3 else _LINEAR for i in range(pick(config, "num_hidden_layers"))]
    kinds = pick_layer_types(config, usual, _LINEAR, _INDEXED, _RELEASED)
    return [
        linear if kind == _LINEAR else shared if indexer == "shared" else full
        for kind, indexer in zip(kinds, read_indexer_types(config), strict=True)
    ]


def _read_attention(config: Mapping[str, Any]) -> MLAConfig:
    attention = read_mla({**config, "qk_rope_head_dim": 0}, rotates=False)
    indexer = IndexerConfig(
        num_heads=pick(config, "index_n_heads", default=32),
        head_dim=pick(config, "index_head_dim", default=128),
        topk=pick(config, "index_topk", default=2048),
        rope=None,
        pool_size=pick(config, "index_kpool", default=16),
    )
    eps = pick(config, "rms_norm_eps", default=_EPS)
    return dataclasses.replace(attention, indexer=indexer, latent_norm_eps=eps)


def _read_bound(config: Mapping[str, Any]) -> float | None:
    """The logarithm of the strongest decay; null means decays without a bound, which a missing setting does not."""
    bound = config.get("linear_lower_bound", -5.0)
    inner = pick(config, "linear_attn_config", default={})
    if inner:
        check_equal(
            [
                ("linear_lower_bound", config.get("linear_lower_bound")),
                ("linear_attn_config.gate_lower_bound", inner.get("gate_lower_bound")),
            ]
        )
        bound = inner.get("gate_lower_bound", bound)
        if bound is None and pick(inner, "safe_gate", default=True):
            bound = -5.0
    return None if bound is None else float(pick({"linear_lower_bound": bound}, "linear_lower_bound", default=-5.0))


def _limited(layer: LayerConfig, limit: float) -> LayerConfig:
    """The layer with clamped activations, in its routed experts and in what serves every token."""
    clamped: Any = {"activation": "limited_swiglu", "activation_limit": limit}
    half = layer.feed_forward
    assert half is not None
    if isinstance(half, MoEConfig) and half.shared is not None:
        half = dataclasses.replace(half, shared=dataclasses.replace(half.shared, **clamped))
    return dataclasses.replace(layer, feed_forward=dataclasses.replace(half, **clamped))


_LAYER = "layers.{layer}"

GLM5_NEXT_TEXT = Family(
    model_type="glm5_next_text",
    read_config=read_config,
    tensors={
        **KIMI_LINEAR.tensors,
        **DEEPSEEK_V32.tensors,
        f"{_LAYER}.attention.w_index_gate": (f"model.{_LAYER}.self_attn.indexer.index_kpool_compress_gate",),
        f"{_LAYER}.attention.b_index_gate": (f"model.{_LAYER}.self_attn.indexer.index_kpool_compress_ape",),
        # As released, and beside fused experts.
        **{
            f"{_LAYER}.{half}_hyper.{ours}": (
                f"model.{_LAYER}.hc_{short}_{theirs}",
                f"model.{_LAYER}.{short}_hc.{theirs}",
            )
            for half, short in (("attention", "attn"), ("feed_forward", "ffn"))
            for ours, theirs in (("w", "fn"), ("bias", "base"), ("scale", "scale"))
        },
    },
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
)
