"""The mapping of a checkpoint's tensors to a model's parameters, by name and region, and the proofs that it is complete.

No weight byte is read here.
"""

from jaxmoe.checkpoint.mapping.abstract import abstract_model, abstract_specs
from jaxmoe.checkpoint.mapping.blocks import Block, whole_tensor_blocks
from jaxmoe.checkpoint.mapping.checks import check_all_used, check_filled_once, check_not_quantized, check_tensors
from jaxmoe.checkpoint.mapping.experts import expert_blocks, find_expert_layout, fused_expert_blocks, per_expert_blocks
from jaxmoe.checkpoint.mapping.ignore import IgnoreRule
from jaxmoe.checkpoint.mapping.layouts import detect_expert_layout
from jaxmoe.checkpoint.mapping.names import is_expert_stack, layer_index, model_blocks, wanted_names, written_form
from jaxmoe.checkpoint.mapping.tied import TIED_RULE, settle_tied

__all__ = [
    "TIED_RULE",
    "Block",
    "IgnoreRule",
    "abstract_model",
    "abstract_specs",
    "check_all_used",
    "check_filled_once",
    "check_not_quantized",
    "check_tensors",
    "detect_expert_layout",
    "expert_blocks",
    "find_expert_layout",
    "fused_expert_blocks",
    "is_expert_stack",
    "layer_index",
    "model_blocks",
    "per_expert_blocks",
    "settle_tied",
    "wanted_names",
    "whole_tensor_blocks",
    "written_form",
]
