"""Qwen4-Exp, the text model: Qwen3.5's layers on several residual streams, and attention to chosen blocks of keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    DecoderConfig,
    GatedStreamsConfig,
    LayerConfig,
    PooledBlockAttentionConfig,
    TokenMixerConfig,
    pick,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import Family
from jaxmoe.models.qwen3_5_moe import QWEN3_5_MOE_TEXT
from jaxmoe.models.qwen3_next import read_delta_net, read_gated_attention
from jaxmoe.models.readers import check_known, read_moe_with_gated_expert


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a qwen4_exp_text checkpoint.

    Raises:
        ValueError: a setting is missing, or asks for what is not known here, as embeddings of n-grams.
    """
    if layers := pick(config, "ple_layer_ids", default=[]):
        raise ValueError(
            f"layers {layers!r:.80} of qwen4_exp_text add embeddings of n-grams (ple_layer_ids), which jaxmoe does not "
            "compute; without them the model would be another one"
        )
    check_known(config, indexer_kv_heads=1)
    moe = read_moe_with_gated_expert(config, renormalize=pick(config, "norm_topk_prob", default=True))
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        norm="rms_zero_centered",
        final_norm=False,
        layers=tuple(
            LayerConfig(attention=mixer, feed_forward=moe, pre_norms=False) for mixer in _read_token_mixers(config)
        ),
        streams=GatedStreamsConfig(
            streams=pick(config, "hc_count", default=4), rank=pick(config, "hc_lowrank", default=320)
        ),
    )


def _read_token_mixers(config: Mapping[str, Any]) -> list[TokenMixerConfig]:
    attention = read_gated_attention(config, rotary_part=1.0)
    block_size, budget = pick(config, "indexer_compress_ratio"), pick(config, "indexer_budget")
    if budget % block_size:
        raise ValueError(
            f"the positions of chosen blocks (indexer_budget) fill blocks of indexer_compress_ratio={block_size}; "
            f"config.json has indexer_budget={budget}"
        )
    indexed = PooledBlockAttentionConfig(
        **{field.name: getattr(attention, field.name) for field in dataclasses.fields(attention)},
        index_heads=pick(config, "indexer_n_heads"),
        index_head_dim=pick(config, "indexer_head_dim"),
        block_size=block_size,
        top_blocks=budget // block_size,
    )
    gate = pick(config, "output_gate_type", default=pick(config, "hidden_act", default="silu"))
    if gate not in ("silu", "sigmoid"):
        raise ValueError(f"gates of a delta net (output_gate_type) are silu or sigmoid; config.json has {gate!r}")
    delta_net = dataclasses.replace(read_delta_net(config, fused_projections=False), gate=gate)
    # Released files call attention with an indexer "full_attention".
    kinds = {"full_attention": indexed, "indexed_attention": indexed, "linear_attention": delta_net}
    interval, count = pick(config, "full_attention_interval", default=4), pick(config, "num_hidden_layers")
    usual = ["linear_attention" if (i + 1) % interval else "indexed_attention" for i in range(count)]
    return [kinds[name] for name in pick_layer_types(config, usual, *kinds)]


_STREAMS = {"norm": "hc_norm", "w_down": "input_mix_weight_down", "w_up": "input_mix_weight_up"}
_LAYER = "layers.{layer}"
_INDEXER = f"model.{_LAYER}.self_attn.indexer"

QWEN4_EXP_TEXT = Family(
    model_type="qwen4_exp_text",
    read_config=read_config,
    tensors={
        **QWEN3_5_MOE_TEXT.tensors,
        # In the order of the rows of the tensor that they share.
        **{f"{_LAYER}.attention.w_index_{part}": (f"{_INDEXER}.index_qk_proj.weight",) for part in "qk"},
        **{f"{_LAYER}.attention.index_{part}_norm": (f"{_INDEXER}.{part}_layernorm.weight",) for part in "qk"},
        **{
            f"{_LAYER}.{half}_hyper.{ours}": (f"model.{_LAYER}.{short}_hyper_connection.{theirs}.weight",)
            for half, short in (("attention", "attn"), ("feed_forward", "mlp"))
            for ours, theirs in {**_STREAMS, "w_write": "block_inject_weight"}.items()
        },
        **{
            f"hyper_head.{ours}": (f"model.hyper_connection_mixer.{theirs}.weight",)
            for ours, theirs in _STREAMS.items()
        },
    },
    experts=QWEN3_5_MOE_TEXT.experts,
    ignored=QWEN3_5_MOE_TEXT.ignored,
)
