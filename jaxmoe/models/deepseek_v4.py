"""DeepSeek-V4: compressed attention, several residual streams, first layers whose experts a table chooses by token."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    CompressedAttentionConfig,
    CompressionConfig,
    DecoderConfig,
    HyperConnectionConfig,
    IndexerConfig,
    LayerConfig,
    MoEConfig,
    RouterConfig,
    pick,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.deepseek import check_setting
from jaxmoe.models.family import ROTARY_BUFFERS, ExpertTensors, Family
from jaxmoe.models.readers import read_mlp, read_moe
from jaxmoe.rotary import RopeConfig, read_rope, rope_settings

_WINDOW, _SPARSE, _HEAVY = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
_KINDS_BY_RATIO = {0: _WINDOW, 4: _SPARSE, 128: _HEAVY}
_SCORES: dict[str, Any] = {"sqrtsoftplus": "sqrt_softplus", "softmax": "softmax", "sigmoid": "sigmoid"}
_AS_RELEASED = {"num_key_value_heads": 1, "n_shared_experts": 1, "norm_topk_prob": True, "attention_bias": False}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a deepseek_v4 checkpoint.

    Raises:
        ValueError: it asks for something that transformers does not look at, or lists kinds of layers that are not known.
    """
    for name, value in {**_AS_RELEASED, "topk_method": "noaux_tc", "hidden_act": "silu"}.items():
        if pick(config, name, default=value) != value:
            raise ValueError(
                f"{name} of deepseek_v4 is {value!r} in every released model; config.json has {config[name]!r}"
            )
    attention = {kind: _read_attention(config, kind) for kind in (_WINDOW, _SPARSE, _HEAVY)}
    moe = _read_moe(config)
    by_token = dataclasses.replace(moe, router=_read_router(config, correction_bias=False))
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6, positions=1048576),
        layers=tuple(
            LayerConfig(attention=attention[kind], feed_forward=by_token if table else moe, experts_by_token=table)
            for kind, table in zip(_layer_types(config), _with_table(config), strict=True)
        ),
        norm="rms_float32",
        num_mtp_layers=pick(config, "num_nextn_predict_layers", default=1),
        streams=HyperConnectionConfig(
            streams=pick(config, "hc_mult"),
            iterations=pick(config, "hc_sinkhorn_iters"),
            eps=pick(config, "hc_eps", default=1e-6),
        ),
    )


def read_reference_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a deepseek_ref checkpoint, which is DeepSeek-V4 with few of its settings written down.

    All that is left out is the same in every release but one number, which is asked for.

    Raises:
        ValueError: that number is missing, or as for `read_config`.
    """
    if config.get("routed_scaling_factor") is None:
        raise ValueError(
            "config.json of deepseek_ref has no routed_scaling_factor, in which DeepSeek-V4's releases differ: it is 1.5 in "
            "DeepSeek-V4-Flash and 2.5 in DeepSeek-V4-Pro; write that of the model into config.json"
        )
    return read_config(config)


def _read_attention(config: Mapping[str, Any], kind: str) -> CompressedAttentionConfig:
    main, compressed = _read_ropes(config)
    rope = main if kind == _WINDOW else compressed
    return CompressedAttentionConfig(
        num_heads=pick(config, "num_attention_heads"),
        head_dim=pick(config, "head_dim"),
        q_rank=pick(config, "q_lora_rank"),
        output_groups=pick(config, "o_groups"),
        output_rank=pick(config, "o_lora_rank"),
        window=pick(config, "sliding_window"),
        rope=rope,
        compression=None if kind == _WINDOW else _read_compression(config, kind, rope),
    )


def _read_compression(config: Mapping[str, Any], kind: str, rope: RopeConfig) -> CompressionConfig:
    older, usual = ("compress_rate_csa", 4) if kind == _SPARSE else ("compress_rate_hca", 128)
    rates = {kind: pick(config, older, default=usual), **pick(config, "compress_rates", default={})}
    if kind == _HEAVY:
        return CompressionConfig(rate=pick(rates, kind), overlap=False)
    indexer = IndexerConfig(
        num_heads=pick(config, "index_n_heads"),
        head_dim=pick(config, "index_head_dim"),
        topk=pick(config, "index_topk"),
        rope=rope,
    )
    return CompressionConfig(rate=pick(rates, kind), overlap=True, indexer=indexer)


def _read_ropes(config: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """The rotary embeddings of layers with a window alone, and of those with entries, which a long context stretches."""
    head_dim = pick(config, "head_dim")
    part = pick(config, "qk_rope_head_dim", default=head_dim // 8) / head_dim
    part = pick(config, "partial_rotary_factor", default=part)
    rope = rope_settings(config)
    main: Any = {"rope_theta": pick(config, "rope_theta", default=10000.0), "partial_rotary_factor": part}
    compress: Any = {
        **rope,
        "rope_theta": pick(config, "compress_rope_theta", default=160000.0),
        "partial_rotary_factor": part,
    }
    if "main" in rope and "compress" in rope:
        main, compress = rope["main"], rope["compress"]
    elif (compress.get("rope_type") or compress.get("type")) == "yarn":
        # DeepSeek's code does not correct the temperature of what it stretches.
        compress.setdefault("attention_factor", 1.0)
    found = [
        read_rope(config, head_dim=head_dim, default_theta=theta, interleaved=True, partial=True, rope=settings)
        for theta, settings in ((10000.0, main), (160000.0, compress))
    ]
    return found[0], found[1]


def _read_router(config: Mapping[str, Any], *, correction_bias: bool) -> RouterConfig:
    return RouterConfig(
        score=_SCORES[check_setting(config, "scoring_func", *_SCORES)],
        correction_bias=correction_bias,
        sum_epsilon=1e-20,
        scale=float(pick(config, "routed_scaling_factor", default=1.5)),
    )


def _read_moe(config: Mapping[str, Any]) -> MoEConfig:
    limited = {"activation": "limited_swiglu", "activation_limit": pick(config, "swiglu_limit", default=10.0)}
    shared = dataclasses.replace(read_mlp(config, pick(config, "moe_intermediate_size")), **limited)
    router = _read_router(config, correction_bias=True)
    moe = read_moe(config, "n_routed_experts", "num_experts", "num_local_experts", router=router, shared=shared)
    return dataclasses.replace(moe, **limited)


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """The kind of attention of each layer; ``compress_ratios`` has those of the layers behind the model's own as well."""
    count = pick(config, "num_hidden_layers")
    usual = [_HEAVY if i < 2 or i % 2 == 0 else _SPARSE for i in range(count)]
    ratios: list[Any] = pick(config, "compress_ratios", default=[])
    if ratios:
        if len(ratios) < count or any(type(ratio) is not int or ratio not in _KINDS_BY_RATIO for ratio in ratios):
            raise ValueError(
                f"compress_ratios of deepseek_v4 has 0, 4 or 128 for each of the {count} layers; config.json has "
                f"{ratios!r:.80}"
            )
        usual = [_KINDS_BY_RATIO[ratio] for ratio in ratios[:count]]
    return pick_layer_types(config, usual, _WINDOW, _SPARSE, _HEAVY)


def _with_table(config: Mapping[str, Any]) -> list[bool]:
    """Tell for each layer whether its experts are chosen by token."""
    count, first = pick(config, "num_hidden_layers"), pick(config, "num_hash_layers", default=3)
    kinds: list[Any] = pick(
        config, "mlp_layer_types", default=["hash_moe" if i < first else "moe" for i in range(count)]
    )
    if len(kinds) != count or any(kind not in ("hash_moe", "moe") for kind in kinds):
        raise ValueError(
            f"mlp_layer_types of deepseek_v4 has hash_moe or moe for each of the {count} layers; config.json has "
            f"{kinds!r:.80}"
        )
    return [kind == "hash_moe" for kind in kinds]


# A parameter of a layer: the publisher's name, and that of transformers beside fused experts.
_LAYER = {
    "attention_norm.weight": ("attn_norm.weight", "input_layernorm.weight"),
    "feed_forward_norm.weight": ("ffn_norm.weight", "post_attention_layernorm.weight"),
    "attention.w_q_a": ("attn.wq_a.weight", "self_attn.q_a_proj.weight"),
    "attention.q_a_norm": ("attn.q_norm.weight", "self_attn.q_a_norm.weight"),
    "attention.w_q_b": ("attn.wq_b.weight", "self_attn.q_b_proj.weight"),
    "attention.w_kv": ("attn.wkv.weight", "self_attn.kv_proj.weight"),
    "attention.kv_norm": ("attn.kv_norm.weight", "attn.norm.weight", "self_attn.kv_norm.weight"),
    "attention.sinks": ("attn.attn_sink", "self_attn.sinks"),
    "attention.w_o_a": ("attn.wo_a.weight", "self_attn.o_a_proj.weight"),
    "attention.w_o_b": ("attn.wo_b.weight", "self_attn.o_b_proj.weight"),
    **{
        f"attention.{ours}": (f"attn.{theirs}.{short}", f"self_attn.{fused}.{long}")
        for theirs, fused, name in (
            ("compressor", "compressor", "entry"),
            ("indexer.compressor", "compressor.indexer", "index"),
        )
        for ours, short, long in (
            (f"w_{name}_kv", "wkv.weight", "kv_proj.weight"),
            (f"w_{name}_gate", "wgate.weight", "gate_proj.weight"),
            (f"b_{name}", "ape", "position_bias"),
            (f"{name}_norm", "norm.weight", "kv_norm.weight"),
        )
    },
    "attention.w_index_q": ("attn.indexer.wq_b.weight", "self_attn.compressor.indexer.q_b_proj.weight"),
    "attention.w_index_heads": (
        "attn.indexer.weights_proj.weight",
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    ),
    "moe.w_router": ("ffn.gate.weight", "mlp.gate.weight"),
    "moe.correction_bias": ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    "token_experts": ("ffn.gate.tid2eid", "mlp.gate.tid2eid"),
    **{
        f"moe.shared.w_{part}": (f"ffn.shared_experts.w{i}.weight", f"mlp.shared_experts.{part}_proj.weight")
        for part, i in (("gate", 1), ("up", 3), ("down", 2))
    },
    **{
        f"{half}_hyper.{ours}": (f"hc_{short}_{theirs}", f"{short}_hc.{theirs}")
        for half, short in (("attention", "attn"), ("feed_forward", "ffn"))
        for ours, theirs in (("w", "fn"), ("bias", "base"), ("scale", "scale"))
    },
}


def _spellings(names: tuple[str, ...]) -> tuple[str, ...]:
    """The publisher's name, which has no ``model.``; those that transformers writes have it, whatever the experts' form."""
    return (f"layers.{{layer}}.{names[0]}", *(f"model.layers.{{layer}}.{name}" for name in names))


def _experts(prefix: str) -> ExpertTensors:
    """The names of experts one by one, which have a prefix or not, beside those of fused ones."""
    expert = f"{prefix}layers.{{layer}}.ffn.experts.{{expert}}"
    return ExpertTensors(
        gate=f"{expert}.w1.weight",
        up=f"{expert}.w3.weight",
        down=f"{expert}.w2.weight",
        fused_gate_up="model.layers.{layer}.mlp.experts.gate_up_proj",
        fused_down="model.layers.{layer}.mlp.experts.down_proj",
    )


DEEPSEEK_V4 = Family(
    model_type="deepseek_v4",
    read_config=read_config,
    tensors={
        "embed.weight": ("embed.weight", "model.embed_tokens.weight"),
        **{f"layers.{{layer}}.{path}": _spellings(names) for path, names in _LAYER.items()},
        "hyper_head.w": ("hc_head_fn", "model.hc_head.hc_fn"),
        "hyper_head.bias": ("hc_head_base", "model.hc_head.hc_base"),
        "hyper_head.scale": ("hc_head_scale", "model.hc_head.hc_scale"),
        "norm.weight": ("norm.weight", "model.norm.weight"),
        "lm_head.weight": ("head.weight", "lm_head.weight"),
    },
    experts=_experts(""),
    renamed_experts=_experts("model."),
    ignored={**ROTARY_BUFFERS, "multi-token prediction": r"(model\.)?mtp\..*"},
)

DEEPSEEK_REF = dataclasses.replace(DEEPSEEK_V4, model_type="deepseek_ref", read_config=read_reference_config)
