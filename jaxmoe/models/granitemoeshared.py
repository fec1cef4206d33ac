"""Granite-MoE with an MLP of every token beside the routed experts."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.config import DecoderConfig, pick
from jaxmoe.models.family import Family
from jaxmoe.models.granitemoe import (
    GRANITEMOE,
    read_granite,
    read_granite_attention,
    read_granite_moe,
    read_shared_mlp,
    shared_mlp_tensors,
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a granitemoeshared checkpoint."""
    # Without a width there is no such MLP.
    shared = None if config.get("shared_intermediate_size") is None else read_shared_mlp(config)
    attention = read_granite_attention(config)
    return read_granite(
        config, [attention] * pick(config, "num_hidden_layers"), read_granite_moe(config, shared=shared)
    )


GRANITEMOESHARED: Family = dataclasses.replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    read_config=read_config,
    tensors={**GRANITEMOE.tensors, **shared_mlp_tensors("moe.shared")},
)
