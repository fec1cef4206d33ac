"""The mapping of a checkpoint's tensors to a model's parameters, by name and region, and the proofs that it is complete.

No weight byte is read here. `jaxmoe.checkpoint.mapping.family_checkpoint` has the way that a tensor takes.
"""

from jaxmoe.checkpoint.mapping.abstract import abstract_model, abstract_specs, count_parameters
from jaxmoe.checkpoint.mapping.blocks import Block, whole_tensor_blocks
from jaxmoe.checkpoint.mapping.expected import expected_checkpoint
from jaxmoe.checkpoint.mapping.experts import expert_blocks, find_expert_layout, fused_expert_blocks, per_expert_blocks
from jaxmoe.checkpoint.mapping.family_checkpoint import PREDICTING_RULE, UNREAD_RULE, FamilyCheckpoint
from jaxmoe.checkpoint.mapping.ignore import IgnoreRule
from jaxmoe.checkpoint.mapping.layouts import detect_expert_layout
from jaxmoe.checkpoint.mapping.mapped import MappedCheckpoint, Unused
from jaxmoe.checkpoint.mapping.names import layer_index, written_blocks, written_form
from jaxmoe.checkpoint.mapping.own_part import REST
from jaxmoe.checkpoint.mapping.packed import PackingChoice, choose_packings, pack_everything, pack_model
from jaxmoe.checkpoint.mapping.packed_blocks import hold_packed
from jaxmoe.checkpoint.mapping.rounding import asked_activations, read_input_scales
from jaxmoe.checkpoint.mapping.spellings import Spellings
from jaxmoe.checkpoint.mapping.tied import TIED_RULE
from jaxmoe.models.parts import is_expert_stack, linear_kind

__all__ = [
    "PREDICTING_RULE",
    "REST",
    "TIED_RULE",
    "UNREAD_RULE",
    "Block",
    "FamilyCheckpoint",
    "IgnoreRule",
    "MappedCheckpoint",
    "PackingChoice",
    "Spellings",
    "Unused",
    "abstract_model",
    "abstract_specs",
    "asked_activations",
    "choose_packings",
    "count_parameters",
    "detect_expert_layout",
    "expected_checkpoint",
    "expert_blocks",
    "find_expert_layout",
    "fused_expert_blocks",
    "hold_packed",
    "is_expert_stack",
    "layer_index",
    "linear_kind",
    "pack_everything",
    "pack_model",
    "per_expert_blocks",
    "read_input_scales",
    "whole_tensor_blocks",
    "written_blocks",
    "written_form",
]
