"""DeepSeek-V3.2 and GLM-5: DeepSeek-V3 with latent attention to positions that an indexer chooses."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, IndexerConfig, MLAConfig, pick, pick_layer_types
from jaxmoe.models.deepseek import DEEPSEEK_TENSORS, check_setting, read_deepseek, read_mla
from jaxmoe.models.family import MLP_EXPERTS, MTP_BEHIND, MTP_LAYERS, ROTARY_BUFFERS, Family
from jaxmoe.models.readers import read_grouped_sigmoid_router


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a deepseek_v32 checkpoint.

    Raises:
        ValueError: it asks for another score or another choice of experts than the family has, for another rotation, or
            for layers without an indexer.
    """
    attention = _read_attention(config, interleaved=False)
    return _read(config, [attention] * pick(config, "num_hidden_layers"), num_groups=8, topk_groups=4, norm_eps=1e-6)


def read_glm_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a glm_moe_dsa checkpoint, some of whose layers may reuse the choice of a layer before.

    Raises:
        ValueError: as for `read_config`, or the list of these layers is of another length or has something else in it.
    """
    attention = _read_attention(config, interleaved=True)
    assert attention.indexer is not None
    reuses = dataclasses.replace(attention, indexer=dataclasses.replace(attention.indexer, reuses=True))
    layers = [reuses if kind == "shared" else attention for kind in read_indexer_types(config)]
    return _read(config, layers, num_groups=1, topk_groups=1, norm_eps=1e-5)


def _read(config: Mapping[str, Any], attention: list[MLAConfig], *, norm_eps: float, **groups: int) -> DecoderConfig:
    check_setting(config, "topk_method", "noaux_tc")
    check_setting(config, "scoring_func", "sigmoid")
    # Two names of one thing, in the configs of different versions.
    pick_layer_types(config, ["indexed_attention"] * len(attention), "indexed_attention", "deepseek_sparse_attention")
    return read_deepseek(
        config,
        attention=attention,
        router=read_grouped_sigmoid_router(config, **groups, scale=2.5),
        shared_experts=1,
        first_sparse=3,
        norm_eps=norm_eps,
        num_mtp_layers=pick(config, "num_nextn_predict_layers", "num_mtp_layers", default=1),
    )


def _read_attention(config: Mapping[str, Any], *, interleaved: bool) -> MLAConfig:
    """Read attention with an indexer, whose heads rotate like the others, or by halves."""
    for name, value in (("rope_interleave", True), ("indexer_rope_interleave", interleaved)):
        if pick(config, name, default=value) is not value:
            raise ValueError(
                f"{name} of {config['model_type']} is {str(value).lower()}, which transformers computes whatever it says; "
                f"config.json has {config[name]!r}"
            )
    attention = read_mla(config, interleaved=True)
    assert attention.rope is not None
    indexer = IndexerConfig(
        num_heads=pick(config, "index_n_heads"),
        head_dim=pick(config, "index_head_dim"),
        topk=pick(config, "index_topk"),
        rope=dataclasses.replace(attention.rope, interleaved=interleaved),
    )
    return dataclasses.replace(attention, indexer=indexer)


def read_indexer_types(config: Mapping[str, Any]) -> list[str]:
    """Read the kind of each layer, "full" or "shared": as a list, as a word of F and S, or each so many layers one.

    Raises:
        ValueError: the list is of another length, or has something else in it.
    """
    count, kinds = pick(config, "num_hidden_layers"), {"F": "full", "S": "shared"}
    every = pick(config, "index_topk_freq", default=1)
    first = pick(config, "index_skip_topk_offset", default=2)
    usual: Any = ["full" if max(i - first + 1, 0) % every == 0 else "shared" for i in range(count)]
    listed: Any = config.get("indexer_types") or config.get("index_topk_pattern") or usual
    if isinstance(listed, str):
        listed = [kinds.get(letter, letter) for letter in listed]
    if not isinstance(listed, list) or len(listed) != count or any(kind not in kinds.values() for kind in listed):
        raise ValueError(
            f"indexer_types has full or shared for each of the {count} layers (index_topk_pattern F or S); config.json has "
            f"{listed!r:.80}"
        )
    return listed


_INDEXER = "model.layers.{layer}.self_attn.indexer"

DEEPSEEK_V32 = Family(
    model_type="deepseek_v32",
    read_config=read_config,
    tensors={
        **DEEPSEEK_TENSORS,
        "layers.{layer}.attention.w_index_q": (f"{_INDEXER}.wq_b.weight",),
        "layers.{layer}.attention.w_index_k": (f"{_INDEXER}.wk.weight",),
        "layers.{layer}.attention.index_k_norm": (f"{_INDEXER}.k_norm.weight",),
        "layers.{layer}.attention.b_index_k_norm": (f"{_INDEXER}.k_norm.bias",),
        "layers.{layer}.attention.w_index_heads": (f"{_INDEXER}.weights_proj.weight",),
    },
    experts=MLP_EXPERTS,
    ignored={**ROTARY_BUFFERS, **MTP_LAYERS},
    mtp=MTP_BEHIND,
)

GLM_MOE_DSA = dataclasses.replace(DEEPSEEK_V32, model_type="glm_moe_dsa", read_config=read_glm_config)
