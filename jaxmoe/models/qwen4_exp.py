"""Qwen4-Exp, the text model: Qwen3.5's layers on several residual streams, and attention to chosen blocks of keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    DecoderConfig,
    GatedStreamsConfig,
    LayerConfig,
    NGramConfig,
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
        ValueError: a setting is missing, or asks for what is not known here.
    """
    check_known(config, indexer_kv_heads=1)
    moe = read_moe_with_gated_expert(config, renormalize=pick(config, "norm_topk_prob", default=True))
    mixers = _read_token_mixers(config)
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        norm="rms_zero_centered",
        final_norm=False,
        layers=tuple(
            LayerConfig(attention=mixer, feed_forward=moe, pre_norms=False, ngrams=ngrams)
            for mixer, ngrams in zip(mixers, _read_ngrams(config, len(mixers)), strict=True)
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


def _read_ngrams(config: Mapping[str, Any], count: int) -> list[NGramConfig | None]:
    """The embeddings of n-grams of every layer; ``ple_layer_ids`` counts layers from 1."""
    layers: list[Any] = sorted(set(pick(config, "ple_layer_ids", default=[])))
    if any(type(layer) is not int or not 1 <= layer <= count for layer in layers):
        raise ValueError(f"ple_layer_ids are layers, counted from 1 to {count}; config.json has {layers!r:.80}")
    if not layers:
        return [None] * count
    end = config.get("eos_token_id")
    end = end[0] if isinstance(end, list) and end else end
    if type(end) is not int:
        raise ValueError(f"n-grams end at eos_token_id, an integer or a list of some; config.json has {end!r:.80}")
    ngrams = NGramConfig(
        ngram_size=pick(config, "ngram_size", default=3),
        heads=pick(config, "heads_per_ngram", default=8),
        width=pick(config, "ple_embed_dim", default=pick(config, "hidden_size")),
        vocab_size=pick(config, "vocab_size"),
        least_rows=pick(config, "ngram_vocab_size_base", default=20_000_000),
        rows_multiple=pick(config, "make_ngram_vocab_size_divisible_by", default=128),
        seed=pick(config, "seed", default=1234),
        place=0,
        end_token=end,
        conv_kernel_size=pick(config, "ple_conv_kernel_size", default=4),
        parts=pick(config, "split_ngram_parts", default=512),
    )
    return [
        dataclasses.replace(ngrams, place=layers.index(layer)) if layer in layers else None
        for layer in range(1, count + 1)
    ]


_STREAMS = {"norm": "hc_norm", "w_down": "input_mix_weight_down", "w_up": "input_mix_weight_up"}
_LAYER = "layers.{layer}"
_INDEXER = f"model.{_LAYER}.self_attn.indexer"
_NGRAMS = f"model.{_LAYER}.ple"

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
        f"{_LAYER}.ngrams.table.weight": (
            f"{_NGRAMS}.ple_embedding.ngram_embedding.shard_{{part}}.weight",
            f"{_NGRAMS}.ple_embedding.ngram_embedding.weight",
        ),
        **{f"{_LAYER}.ngrams.w_{name}": (f"{_NGRAMS}.{name}_proj.weight",) for name in ("key", "value")},
        **{f"{_LAYER}.ngrams.{name}_norm": (f"{_NGRAMS}.norm_{name}.weight",) for name in ("key", "query", "conv")},
        f"{_LAYER}.ngrams.conv": (f"{_NGRAMS}.conv1d.weight",),
        **{
            f"hyper_head.{ours}": (f"model.hyper_connection_mixer.{theirs}.weight",)
            for ours, theirs in _STREAMS.items()
        },
    },
    experts=QWEN3_5_MOE_TEXT.experts,
    # What config.json says as well.
    ignored={
        **QWEN3_5_MOE_TEXT.ignored,
        "numbers of the hash of n-grams": r"model\.layers\.\d+\.ple\.ple_embedding\."
        r"(layer_multipliers|ngram_heads_vocab_sizes|ngram_heads_offsets)",
    },
)
