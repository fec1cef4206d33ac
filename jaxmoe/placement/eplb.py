"""EPLB: DeepSeek's expert parallelism load balancer as published, see `ExpertPlacement.from_counts`."""

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.packing import eplb_slots
from jaxmoe.placement.strategy import PlacementTask, Strategy


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    return _place(task, num_groups=task.num_groups, num_nodes=task.num_nodes)


def _make_global(task: PlacementTask) -> list[ExpertPlacement]:
    return _place(task, num_groups=1, num_nodes=1)


def _place(task: PlacementTask, *, num_groups: int, num_nodes: int) -> list[ExpertPlacement]:
    assert task.counts is not None
    slots_LP = eplb_slots(task.counts, task.ep, num_slots=task.num_slots, num_groups=num_groups, num_nodes=num_nodes)
    return [ExpertPlacement(task.num_experts, task.ep, slots_P) for slots_P in slots_LP]


EPLB = Strategy("eplb", "counts", _make)
EPLB_GLOBAL = Strategy("eplb_global", "counts", _make_global)
