"""Qwen3.5-MoE, the text model: as Qwen3-Next, with a projection for each part of a gated delta net and no dense layers."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, LayerConfig, read_common
from jaxmoe.models.family import MLP_EXPERTS, Family, llama_tensors
from jaxmoe.models.qwen3_next import DELTA_NET_TENSORS, IGNORED, MOE_TENSORS, make_prediction_tensors, read_token_mixers
from jaxmoe.models.readers import read_moe_with_gated_expert


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a qwen3_5_moe_text checkpoint.

    Raises:
        ValueError: a setting is missing, or asks for a kind of layer that is not known here.
    """
    # The weights of a token's experts add up to one; no setting changes that.
    moe = read_moe_with_gated_expert(config, renormalize=True)
    return DecoderConfig(
        **read_common(config, norm_eps=1e-6),
        norm="rms_zero_centered",
        layers=tuple(
            LayerConfig(attention=mixer, feed_forward=moe)
            for mixer in read_token_mixers(config, fused_projections=False)
        ),
    )


_DELTA_NET = "model.layers.{layer}.linear_attn"

QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    read_config=read_config,
    tensors=llama_tensors(
        {
            # In the order of the rows of the tensor that they share.
            **{f"layers.{{layer}}.attention.w_in_{part}": (f"{_DELTA_NET}.in_proj_qkv.weight",) for part in "qkv"},
            **{f"layers.{{layer}}.attention.w_in_{part}": (f"{_DELTA_NET}.in_proj_{part}.weight",) for part in "zba"},
            **DELTA_NET_TENSORS,
            **MOE_TENSORS,
        }
    ),
    experts=MLP_EXPERTS,
    ignored=IGNORED,
    mtp=make_prediction_tensors(renormalize=True),
)
