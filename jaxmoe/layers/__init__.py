"""The parts a decoder is composed of, as Flax nnx modules and the pure functions they call."""

from jaxmoe.layers.adapters import (
    adaptable_params,
    factor_specs,
    held_factors,
    held_ranks,
    hold_factor,
    make_room,
    write_adapter,
)
from jaxmoe.layers.attention import Attention, KVCache
from jaxmoe.layers.cache import CacheArray, accepted
from jaxmoe.layers.device_work import kernel_work
from jaxmoe.layers.embedding import VocabTable
from jaxmoe.layers.logical import abstract_logical_state, load_logical_state, logical_state
from jaxmoe.layers.mixers import TOKEN_MIXERS, make_token_mixer
from jaxmoe.layers.mlp import MLP
from jaxmoe.layers.moe import MoE, dispatch_shape
from jaxmoe.layers.moe_checks import check_expert_axes
from jaxmoe.layers.ngrams import NGrams
from jaxmoe.layers.norm import NORMS, RMSNorm
from jaxmoe.layers.packed import pack_params, packable_params, packings_of, part_specs, unpacked_specs
from jaxmoe.layers.param import ParamFactory, ParamSpec
from jaxmoe.layers.replicas import ReplicaRule
from jaxmoe.layers.routed_experts import MoEStats
from jaxmoe.layers.router import route
from jaxmoe.layers.specs import param_specs, params_by_path
from jaxmoe.layers.streams import STREAMS, append_stream, join_streams
from jaxmoe.layers.swap import MovedBytes, rebalance_layers, swap_experts
from jaxmoe.layers.usable import check_usable

__all__ = [
    "MLP",
    "NORMS",
    "STREAMS",
    "TOKEN_MIXERS",
    "Attention",
    "CacheArray",
    "KVCache",
    "MoE",
    "MoEStats",
    "MovedBytes",
    "NGrams",
    "ParamFactory",
    "ParamSpec",
    "RMSNorm",
    "ReplicaRule",
    "VocabTable",
    "abstract_logical_state",
    "accepted",
    "adaptable_params",
    "append_stream",
    "check_expert_axes",
    "check_usable",
    "dispatch_shape",
    "factor_specs",
    "held_factors",
    "held_ranks",
    "hold_factor",
    "join_streams",
    "kernel_work",
    "load_logical_state",
    "logical_state",
    "make_room",
    "make_token_mixer",
    "pack_params",
    "packable_params",
    "packings_of",
    "param_specs",
    "params_by_path",
    "part_specs",
    "rebalance_layers",
    "route",
    "swap_experts",
    "unpacked_specs",
    "write_adapter",
]
