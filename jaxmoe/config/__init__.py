"""Frozen configs of a decoder's parts, and the reading of a checkpoint's ``config.json``.

One config per component, each checked when it is made. A family's file turns the
dictionary that `read_config_json` returns into a `DecoderConfig`.
"""

from jaxmoe.config.agreement import SPELLINGS, check_agreement, check_equal
from jaxmoe.config.attention import (
    AttentionConfig,
    AttentionMask,
    BlockSparseAttentionConfig,
    Chunks,
    PooledBlockAttentionConfig,
    QueryKeyNorm,
    QueryTemperature,
    SlidingWindow,
)
from jaxmoe.config.compressed_attention import CompressedAttentionConfig, CompressionConfig
from jaxmoe.config.decoder import (
    AveragedStreamsConfig,
    BlockResidualsConfig,
    DecoderConfig,
    GatedStreamsConfig,
    HyperConnectionConfig,
    LayerConfig,
    MTPConfig,
)
from jaxmoe.config.feed_forward import MLPConfig, MoEConfig
from jaxmoe.config.latent_attention import IndexerConfig, MLAConfig
from jaxmoe.config.ngrams import NGramConfig
from jaxmoe.config.places import (
    CONVERTING,
    STORED,
    directory_of,
    find_checkpoint,
    partial_directory,
    shard_of,
)
from jaxmoe.config.reading import (
    config_parts,
    pick,
    pick_layer_flags,
    pick_layer_types,
    read_common,
    read_config_json,
    read_dtype,
    read_json,
    way_to_file,
)
from jaxmoe.config.recurrent import GatedDeltaNetConfig, KDAConfig, Mamba2Config, MambaConfig, ShortConvConfig
from jaxmoe.config.routers import (
    SCORES,
    ChosenByFunction,
    ExpertChoice,
    GroupedTopK,
    Normalization,
    PNormNormalization,
    RouterConfig,
    RouterFunction,
    SparseMixer,
    SumNormalization,
    TopK,
)
from jaxmoe.config.token_mixers import TokenMixerConfig

__all__ = [
    "CONVERTING",
    "SCORES",
    "SPELLINGS",
    "STORED",
    "AttentionConfig",
    "AttentionMask",
    "AveragedStreamsConfig",
    "BlockResidualsConfig",
    "BlockSparseAttentionConfig",
    "ChosenByFunction",
    "Chunks",
    "CompressedAttentionConfig",
    "CompressionConfig",
    "DecoderConfig",
    "ExpertChoice",
    "GatedDeltaNetConfig",
    "GatedStreamsConfig",
    "GroupedTopK",
    "HyperConnectionConfig",
    "IndexerConfig",
    "KDAConfig",
    "LayerConfig",
    "MLAConfig",
    "MLPConfig",
    "MTPConfig",
    "Mamba2Config",
    "MambaConfig",
    "MoEConfig",
    "NGramConfig",
    "Normalization",
    "PNormNormalization",
    "PooledBlockAttentionConfig",
    "QueryKeyNorm",
    "QueryTemperature",
    "RouterConfig",
    "RouterFunction",
    "ShortConvConfig",
    "SlidingWindow",
    "SparseMixer",
    "SumNormalization",
    "TokenMixerConfig",
    "TopK",
    "check_agreement",
    "check_equal",
    "config_parts",
    "directory_of",
    "find_checkpoint",
    "partial_directory",
    "pick",
    "pick_layer_flags",
    "pick_layer_types",
    "read_common",
    "read_config_json",
    "read_dtype",
    "read_json",
    "shard_of",
    "way_to_file",
]
