"""Tables and files that vLLM and other engines use, read or produced in the terms of jaxmoe."""

from jaxmoe.interop.expert_maps import (
    LocalExperts,
    RoutingTables,
    determine_expert_map,
    determine_expert_placement_strategy,
    expert_map,
    expert_mask,
    initial_physical_to_logical,
    round_robin_routing_tables,
)
from jaxmoe.interop.expert_params import (
    Assignment,
    ExpertRow,
    activation_scale_mapping,
    assignments,
    expert_params_mapping,
    fused_chunk,
    per_tensor_scale,
    scale_index,
    weight_scale_mapping,
)

__all__ = [
    "Assignment",
    "ExpertRow",
    "LocalExperts",
    "RoutingTables",
    "activation_scale_mapping",
    "assignments",
    "determine_expert_map",
    "determine_expert_placement_strategy",
    "expert_map",
    "expert_mask",
    "expert_params_mapping",
    "fused_chunk",
    "initial_physical_to_logical",
    "per_tensor_scale",
    "round_robin_routing_tables",
    "scale_index",
    "weight_scale_mapping",
]
