"""Frozen configs of a decoder's parts, and the reading of a checkpoint's ``config.json``.

One config per component, each checked when it is made. A family's file turns the
dictionary that `read_config_json` returns into a `DecoderConfig`.
"""

from jaxmoe.config.decoder import DecoderConfig, LayerConfig
from jaxmoe.config.feed_forward import MLPConfig, MoEConfig, RouterConfig, RouterFunction
from jaxmoe.config.reading import pick, pick_layer_types, read_common, read_config_json, read_dtype, read_json
from jaxmoe.config.token_mixers import (
    AttentionConfig,
    GatedDeltaNetConfig,
    Mamba2Config,
    MambaConfig,
    MLAConfig,
    TokenMixerConfig,
)

__all__ = [
    "AttentionConfig",
    "DecoderConfig",
    "GatedDeltaNetConfig",
    "LayerConfig",
    "MLAConfig",
    "MLPConfig",
    "Mamba2Config",
    "MambaConfig",
    "MoEConfig",
    "RouterConfig",
    "RouterFunction",
    "TokenMixerConfig",
    "pick",
    "pick_layer_types",
    "read_common",
    "read_config_json",
    "read_dtype",
    "read_json",
]
