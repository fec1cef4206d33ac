"""Linear placement: contiguous blocks of experts."""

import numpy as np

from jaxmoe.checks import whole_number
from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.strategy import PlacementTask, Strategy


def linear(num_experts: int, ep: int, *, num_slots: int | None = None, allow_padding: bool = True) -> ExpertPlacement:
    """Give each device a contiguous block of experts, the remainder to the lowest devices.

    Ten experts on four devices are {0, 1, 2}, {3, 4, 5}, {6, 7}, {8, 9}.

    Args:
        num_experts: E.
        ep: devices.
        num_slots: slots to fill; those beyond E hold replicas of expert 0, 1, 2 and on, modulo E.
        allow_padding: whether slots may stay empty.

    Raises:
        ValueError: slots would be padding and `allow_padding` is False, there are fewer slots than experts, or no device.

    Source: vLLM, determine_expert_map and build_initial_global_physical_to_logical_map.
    """
    ep = whole_number("ep", ep, least=1)
    blocks = np.array_split(initial_experts(num_experts, num_slots), ep)
    return ExpertPlacement.from_device_experts(num_experts, blocks, allow_padding=allow_padding)


def initial_experts(num_experts: int, num_slots: int | None) -> np.ndarray:
    """int32 [num_slots], the experts in order and then replicas modulo E.

    Raises:
        ValueError: there are fewer slots than experts.
    """
    num_experts = whole_number("num_experts", num_experts, least=1)
    if num_slots is not None and whole_number("num_slots", num_slots) < num_experts:
        raise ValueError(f"every expert needs a slot: num_slots={num_slots} is below num_experts={num_experts}")
    return np.arange(num_slots or num_experts, dtype=np.int32) % num_experts


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    return [linear(task.num_experts, task.ep, num_slots=task.num_slots)] * task.num_layers


LINEAR = Strategy("linear", "nothing", _make)
