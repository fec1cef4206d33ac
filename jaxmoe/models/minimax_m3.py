"""MiniMax-M3, its text part: most layers attend to blocks of keys that an indexer chooses, clamped experts, a shared one.

transformers calls it minimax_m3_vl_text, and the whole model minimax_m3_vl.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import (
    AttentionConfig,
    BlockSparseAttentionConfig,
    DecoderConfig,
    MLPConfig,
    MoEConfig,
    QueryKeyNorm,
    RouterConfig,
    pick,
    pick_layer_flags,
    pick_layer_types,
    read_common,
)
from jaxmoe.models.family import BLOCK_SPARSE_EXPERTS, ROTARY_BUFFERS, Family, llama_tensors
from jaxmoe.models.readers import check_known, make_layers, read_attention, read_swiglu_limit, sparse_by_list

_FULL, _SPARSE = "full_attention", "minimax_m3_sparse"
# The released files carry these; transformers reads none of them and so writes none.
_ONLY: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "use_gemma_norm": True,
    "attention_output_gate": False,
    "n_shared_experts": 1,
}
_ONLY_OF_THE_INDEXER: dict[str, Any] = {
    "use_sparse_attention": True,
    "sparse_init_block": 0,
    "sparse_score_type": "max",
}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of the text part of a minimax_m3_vl checkpoint.

    Raises:
        ValueError: a setting that the family's released model does not use.
    """
    indexer = pick(config, "sparse_attention_config", default={})
    check_known(config, **_ONLY)
    check_known({"model_type": config["model_type"], **indexer}, **_ONLY_OF_THE_INDEXER)
    if pick(config, "hidden_act", default="silu") not in ("silu", "swigluoai"):
        raise ValueError(f"experts of minimax_m3 are swigluoai; config.json gives hidden_act={config['hidden_act']!r}")
    limit, hidden, count = read_swiglu_limit(config), pick(config, "hidden_size"), pick(config, "num_hidden_layers")

    def mlp(width: str) -> MLPConfig:
        size = pick(config, width)
        return MLPConfig(
            hidden_size=hidden, intermediate_size=size, activation="clamped_swiglu", activation_limit=limit
        )

    moe = MoEConfig(
        num_experts=pick(config, "num_local_experts", "num_experts"),
        num_experts_per_tok=pick(config, "num_experts_per_tok"),
        hidden_size=hidden,
        moe_intermediate_size=pick(config, "intermediate_size"),
        activation="clamped_swiglu",
        activation_limit=limit,
        router=RouterConfig(
            score="sigmoid", correction_bias=True, scale=float(pick(config, "routed_scaling_factor", default=2.0))
        ),
        shared=mlp("shared_intermediate_size"),
    )
    chosen = pick_layer_flags(indexer, "sparse_attention_freq", [False] * count)
    without_values = pick_layer_flags(indexer, "sparse_disable_index_value", chosen)
    if any(flag and not without for flag, without in zip(chosen, without_values, strict=True)):
        raise ValueError(
            "the indexer of minimax_m3 has no values; sparse_disable_index_value is 0 in a layer that has one"
        )
    kinds = pick_layer_types(config, [_SPARSE if flag else _FULL for flag in chosen], _FULL, _SPARSE)
    full = read_attention(config, default_theta=5e6, partial=True, qk_norm=QueryKeyNorm(weight="zero_centered"))
    attention = {_FULL: full, _SPARSE: _read_indexer(config, indexer, full) if _SPARSE in kinds else full}
    sparse = sparse_by_list(config, [True] * count)
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        norm="rms_zero_centered",
        layers=make_layers(
            [attention[kind] for kind in kinds],
            sparse,
            moe,
            None if all(sparse) else mlp("dense_intermediate_size"),
        ),
    )


def _read_indexer(
    config: Mapping[str, Any], indexer: Mapping[str, Any], full: AttentionConfig
) -> BlockSparseAttentionConfig:
    """Attention with an indexer, whose settings stand apart in released files, and on top in those of transformers."""

    def setting(ours: str, theirs: str, default: int) -> int:
        return int(pick({ours: config.get(ours), theirs: indexer.get(theirs)}, theirs, ours, default=default))

    heads = setting("index_n_heads", "sparse_num_index_heads", 4)
    if heads != full.num_kv_heads:
        raise ValueError(
            f"the indexer of minimax_m3 has a head for each key/value head: num_key_value_heads={full.num_kv_heads}; "
            f"config.json gives it {heads}"
        )
    return BlockSparseAttentionConfig(
        **{field.name: getattr(full, field.name) for field in dataclasses.fields(full)},
        index_head_dim=setting("index_head_dim", "sparse_index_dim", 128),
        block_size=setting("index_block_size", "sparse_block_size", 128),
        top_blocks=setting("index_topk_blocks", "sparse_topk_blocks", 16),
        local_blocks=setting("index_local_blocks", "sparse_local_block", 1),
    )


_LAYER = "model.layers.{layer}"


def _mlp_tensors(path: str, *modules: str) -> dict[str, tuple[str, ...]]:
    """An MLP's names, whose gate and up transformers writes as one tensor, in the last of `modules`."""
    joined = f"{_LAYER}.{modules[-1]}.gate_up_proj.weight"
    return {
        **{
            f"layers.{{layer}}.{path}.w_{part}": (
                *(f"{_LAYER}.{module}.{part}_proj.weight" for module in modules),
                joined,
            )
            for part in ("gate", "up")
        },
        f"layers.{{layer}}.{path}.w_down": tuple(f"{_LAYER}.{module}.down_proj.weight" for module in modules),
    }


def _index_tensors() -> dict[str, tuple[str, ...]]:
    parts = {"w_index_q": "q_proj", "w_index_k": "k_proj", "index_q_norm": "q_norm", "index_k_norm": "k_norm"}
    attention = f"{_LAYER}.self_attn"
    return {
        f"layers.{{layer}}.attention.{ours}": (f"{attention}.index_{name}.weight", f"{attention}.indexer.{name}.weight")
        for ours, name in parts.items()
    }


MINIMAX_M3 = Family(
    model_type="minimax_m3_vl_text",
    read_config=read_config,
    tensors=llama_tensors(
        {
            **_index_tensors(),
            "layers.{layer}.moe.w_router": (f"{_LAYER}.block_sparse_moe.gate.weight", f"{_LAYER}.mlp.gate.weight"),
            "layers.{layer}.moe.correction_bias": (
                f"{_LAYER}.block_sparse_moe.e_score_correction_bias",
                f"{_LAYER}.mlp.gate.e_score_correction_bias",
            ),
            **_mlp_tensors("moe.shared", "block_sparse_moe.shared_experts", "mlp.shared_experts"),
            **_mlp_tensors("mlp", "mlp"),
        }
    ),
    experts=BLOCK_SPARSE_EXPERTS,
    # The names of released files mean something to the whole model only.
    written="fused",
    ignored={**ROTARY_BUFFERS, "multi-token prediction": r"(.*\.)?mtp\..*"},
)

# As config.json of the text part alone has it.
MINIMAX_M3_TEXT = dataclasses.replace(MINIMAX_M3, model_type="minimax_m3")
