"""An explicit map: the caller says which experts each device holds."""

from collections.abc import Sequence

import numpy as np

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.strategy import PlacementTask, Strategy


def explicit(device_experts: Sequence[Sequence[int]], *, num_experts: int | None = None) -> ExpertPlacement:
    """Place experts as listed, padding the shorter lists.

    Args:
        device_experts: experts of each device; one may be on several (replicas).
        num_experts: E; None for the largest expert listed, plus one.

    Raises:
        ValueError: an expert is on no device, or a number is no expert.

    Example:
        >>> explicit([[2, 0], [1]]).slot_to_expert.tolist()
        [2, 0, 1, -1]
    """
    lists = [np.asarray(experts).reshape(-1) for experts in device_experts]
    if any(experts.size and experts.min() < 0 for experts in lists):
        raise ValueError("device_experts lists experts, 0 and up; leave a device's list short to pad it")
    if num_experts is None:
        num_experts = 1 + max((int(experts.max()) for experts in lists if experts.size), default=-1)
    return ExpertPlacement.from_device_experts(num_experts, lists)


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    assert task.device_experts is not None
    return [explicit(task.device_experts, num_experts=task.num_experts)] * task.num_layers


EXPLICIT = Strategy("explicit", "map", _make)
