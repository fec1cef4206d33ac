"""Linear placement: contiguous blocks of experts, see `ExpertPlacement.linear`."""

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.strategy import PlacementTask, Strategy


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    return [ExpertPlacement.linear(task.num_experts, task.ep, num_slots=task.num_slots)] * task.num_layers


LINEAR = Strategy("linear", "nothing", _make)
