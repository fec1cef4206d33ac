"""Checkpoints: strict readers, the plan of what goes where, and the loader that carries it out.

The packages follow a tensor from its file to a device, and back:

    formats      the files: their headers, and the bytes of a region of a tensor
    mapping      the parameters, and regions of them, that tensors fill
    lora         adapters: the updates that tensors get on the way
    loading      the plan of every byte, and carrying it out
    saving       the way back, to a new directory of files
    inspection   a summary from headers alone

What each may import of the others is a table in ``tests/test_imports.py``. The errors, and boxes (regions of arrays), are
for all of them.
"""

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import Checkpoint, SafetensorsFile, TensorInfo, open_checkpoint, read_safetensors
from jaxmoe.checkpoint.loading import (
    AdapterReport,
    LoadPlan,
    LoadReport,
    add_adapter,
    load,
    load_arrays,
    load_shards,
    make_load_plan,
    merge_adapter,
    remove_adapter,
)
from jaxmoe.checkpoint.lora import Adapter, open_adapter
from jaxmoe.checkpoint.mapping import (
    Block,
    IgnoreRule,
    expert_blocks,
    find_expert_layout,
    fused_expert_blocks,
    per_expert_blocks,
    whole_tensor_blocks,
)
from jaxmoe.checkpoint.saving import OrbaxReport, SaveReport, convert, convert_to_orbax, save

__all__ = [
    "Adapter",
    "AdapterReport",
    "Block",
    "Checkpoint",
    "CheckpointError",
    "IgnoreRule",
    "LoadPlan",
    "LoadReport",
    "OrbaxReport",
    "SafetensorsFile",
    "SaveReport",
    "TensorInfo",
    "add_adapter",
    "convert",
    "convert_to_orbax",
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
    "remove_adapter",
    "save",
    "whole_tensor_blocks",
]
