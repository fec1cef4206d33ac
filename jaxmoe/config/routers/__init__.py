"""Routers: policies that choose experts by their logits and weight them, and the config that holds one.

A policy is a frozen config that computes: its methods are pure functions of arrays. A new one is a file here with a
subclass of `ExpertChoice`; nothing asks which one it got.
"""

from jaxmoe.config.routers.base import ExpertChoice, Normalization, PNormNormalization, SumNormalization
from jaxmoe.config.routers.config import RouterConfig
from jaxmoe.config.routers.function import ChosenByFunction, RouterFunction
from jaxmoe.config.routers.sparsemixer import SparseMixer
from jaxmoe.config.routers.top_k import SCORES, GroupedTopK, GroupScore, Score, TopK

__all__ = [
    "SCORES",
    "ChosenByFunction",
    "ExpertChoice",
    "GroupScore",
    "GroupedTopK",
    "Normalization",
    "PNormNormalization",
    "RouterConfig",
    "RouterFunction",
    "Score",
    "SparseMixer",
    "SumNormalization",
    "TopK",
]
