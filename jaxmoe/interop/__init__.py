"""Tables and files that vLLM and SGLang use, read or produced in the terms of jaxmoe."""

from jaxmoe.interop.expert_maps import (
    expert_location_json,
    expert_map,
    initial_physical_to_logical,
    physical_to_logical_map,
    placements_from_expert_location,
)
from jaxmoe.interop.expert_params import Assignment, ExpertRow, assignments, expert_params_mapping, map_names

__all__ = [
    "Assignment",
    "ExpertRow",
    "assignments",
    "expert_location_json",
    "expert_map",
    "expert_params_mapping",
    "initial_physical_to_logical",
    "map_names",
    "physical_to_logical_map",
    "placements_from_expert_location",
]
