"""Checkpoints: strict readers, the plan of what goes where, and the loader that carries it out."""

from jaxmoe.checkpoint.adapter import Adapter, open_adapter
from jaxmoe.checkpoint.blocks import Block, whole_tensor_blocks
from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.execute import load_arrays, load_shards
from jaxmoe.checkpoint.experts import (
    expert_blocks,
    find_expert_layout,
    fused_expert_blocks,
    per_expert_blocks,
)
from jaxmoe.checkpoint.files import Checkpoint, open_checkpoint
from jaxmoe.checkpoint.ignore import IgnoreRule
from jaxmoe.checkpoint.load import load
from jaxmoe.checkpoint.merge import merge_adapter
from jaxmoe.checkpoint.plan import LoadPlan, make_load_plan
from jaxmoe.checkpoint.report import AdapterReport, LoadReport
from jaxmoe.checkpoint.safetensors import SafetensorsFile, TensorInfo, read_safetensors
from jaxmoe.checkpoint.save import SaveReport, convert, save

__all__ = [
    "Adapter",
    "AdapterReport",
    "Block",
    "Checkpoint",
    "CheckpointError",
    "IgnoreRule",
    "LoadPlan",
    "LoadReport",
    "SafetensorsFile",
    "SaveReport",
    "TensorInfo",
    "convert",
    "expert_blocks",
    "find_expert_layout",
    "fused_expert_blocks",
    "load",
    "load_arrays",
    "load_shards",
    "make_load_plan",
    "merge_adapter",
    "open_adapter",
    "open_checkpoint",
    "per_expert_blocks",
    "read_safetensors",
    "save",
    "whole_tensor_blocks",
]
