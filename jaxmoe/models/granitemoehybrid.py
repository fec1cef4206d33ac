"""Granite 4: Mamba-2 layers with an attention layer now and then, and an MLP of every token beside the routed experts.

Small models have that MLP alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, Mamba2Config, TokenMixerConfig, pick, pick_layer_types
from jaxmoe.models.family import MAMBA2_NAMES, Family
from jaxmoe.models.granitemoe import (
    GRANITEMOE,
    read_granite,
    read_granite_attention,
    read_granite_moe,
    read_shared_mlp,
    shared_mlp_tensors,
)

# transformers has renamed the kinds of layers.
_OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a granitemoehybrid checkpoint.

    Raises:
        ValueError: a setting is missing, or asks for a kind of layer that is not known here.
    """
    shared = read_shared_mlp(config, default=1024)
    if shared is None:
        raise ValueError("layers of granitemoehybrid have an MLP of every token; shared_intermediate_size is 0")
    attention = read_granite_attention(config)
    if config.get("position_embedding_type") != "rope":
        attention = dataclasses.replace(attention, rope=None)  # Mamba layers tell positions apart
    kinds: dict[str, TokenMixerConfig] = {"linear_attention": _read_mamba2(config), "full_attention": attention}
    named = pick(config, "layer_types", "layers_block_type", default=[])
    count = pick(config, "num_hidden_layers")
    renamed = {"model_type": config["model_type"], "layer_types": [_OLD_KINDS.get(str(kind), kind) for kind in named]}
    mixers = [kinds[kind] for kind in pick_layer_types(renamed if named else {}, ["linear_attention"] * count, *kinds)]
    # 0 experts mean none, and not that their number is missing.
    dense = config.get("num_local_experts", 8) == 0
    return read_granite(config, mixers, shared if dense else read_granite_moe(config, shared=shared))


def _read_mamba2(config: Mapping[str, Any]) -> Mamba2Config:
    channels = pick(config, "mamba_expand", default=2) * pick(config, "hidden_size")
    heads = pick(config, "mamba_n_heads", default=128)
    head_dim = channels // max(heads, 1)
    if config.get("mamba_d_head", "auto") != "auto":
        head_dim = pick(config, "mamba_d_head")
    if heads * head_dim != channels:
        raise ValueError(
            f"Mamba heads have mamba_expand · hidden_size = {channels} channels together; config.json gives {heads} heads "
            f"of {head_dim}"
        )
    least, most = _step_limits(config)
    if most != math.inf:
        raise ValueError(f"Mamba steps of granitemoehybrid have no upper bound; time_step_limit gives {most}")
    return Mamba2Config(
        num_heads=heads,
        head_dim=head_dim,
        num_groups=pick(config, "mamba_n_groups", default=1),
        state_size=pick(config, "mamba_d_state", default=256),
        conv_kernel_size=pick(config, "mamba_d_conv", default=4),
        activation=pick(config, "hidden_act", default="silu"),
        conv_bias=pick(config, "mamba_conv_bias", default=True),
        bias=pick(config, "mamba_proj_bias", default=False),
        min_step=least,
    )


def _step_limits(config: Mapping[str, Any]) -> tuple[float, float]:
    # JSON has no infinity: transformers writes an object for it.
    limits = [
        math.inf if limit == {"__float__": "Infinity"} else limit
        for limit in pick(config, "time_step_limit", default=[0.0, math.inf])
    ]
    if len(limits) != 2 or any(type(limit) not in (int, float) or not limit >= 0 for limit in limits):
        raise ValueError(f"time_step_limit in config.json has two numbers from 0 on; it is {limits!r:.80}")
    return float(limits[0]), float(limits[1])


GRANITEMOEHYBRID: Family = dataclasses.replace(
    GRANITEMOE,
    model_type="granitemoehybrid",
    read_config=read_config,
    tensors={
        **GRANITEMOE.tensors,
        **{
            f"layers.{{layer}}.attention.{path}": (f"model.layers.{{layer}}.mamba.{name}",)
            for path, name in MAMBA2_NAMES.items()
        },
        **shared_mlp_tensors("moe.shared"),
        **shared_mlp_tensors("mlp"),
    },
)
