"""Round-robin placement: neighbouring experts on neighbouring devices."""

from jaxmoe.checks import whole_number
from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.linear import initial_experts
from jaxmoe.placement.strategy import PlacementTask, Strategy


def round_robin(
    num_experts: int, ep: int, *, num_slots: int | None = None, allow_padding: bool = True
) -> ExpertPlacement:
    """Put expert e on device e mod ep, which spreads groups of related neighbours.

    Ten experts on four devices are {0, 4, 8}, {1, 5, 9}, {2, 6}, {3, 7}.

    Args:
        num_experts: E.
        ep: devices.
        num_slots: slots to fill; those beyond E are dealt on, with replicas of expert 0, 1, 2 and so on, modulo E.
        allow_padding: whether slots may stay empty.

    Raises:
        ValueError: slots would be padding and `allow_padding` is False, there are fewer slots than experts, or no device.

    Source: vLLM, determine_expert_map.
    """
    experts, ep = initial_experts(num_experts, num_slots), whole_number("ep", ep, least=1)
    return ExpertPlacement.from_device_experts(
        num_experts, [experts[device::ep] for device in range(ep)], allow_padding=allow_padding
    )


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    return [round_robin(task.num_experts, task.ep, num_slots=task.num_slots)] * task.num_layers


ROUND_ROBIN = Strategy("round_robin", "nothing", _make)
