"""Round-robin placement: neighboring experts on neighboring devices, see `ExpertPlacement.round_robin`."""

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.strategy import PlacementTask, Strategy


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    return [ExpertPlacement.round_robin(task.num_experts, task.ep, num_slots=task.num_slots)] * task.num_layers


ROUND_ROBIN = Strategy("round_robin", "nothing", _make)
