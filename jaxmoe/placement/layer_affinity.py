"""Inter-layer affinity: experts that follow each other from layer to layer live together.

Letters here, beside the common ones of docs/concepts/letters.md: N replicas, D devices.
"""

import numpy as np

from jaxmoe.placement.affinity import Replicas, affinity, even_shares
from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.coactivation import transitions
from jaxmoe.placement.distinct_packing import pack_distinct
from jaxmoe.placement.eplb_uneven import from_devices
from jaxmoe.placement.strategy import PlacementTask, Strategy
from jaxmoe.placement.swaps import gather_by_swaps


def layer_affinity(
    expert_ids: np.ndarray, num_experts: int, ep: int, *, num_slots: int | None = None, load_slack: float = 1.1
) -> list[ExpertPlacement]:
    """Place each layer so that tokens find their next experts on the device of their last ones.

    Counting the tokens that chose expert e in one layer and f in the next, M[e, f], this maximizes
    Σ M[e, f] over pairs on one device: the first layer is placed by co-activation, each further
    one against the layer before it, and then all but the first once more against both
    neighbors. What it saves depends on the dispatch: one that leaves tokens where their experts
    are saves the moves; jaxmoe's brings every token home after each layer, so there the gain is
    only that experts of one kind of text gather (`layer_crossings` in metrics shows it).

    Args:
        expert_ids: integers [T, L, K], the choices of a trace, -1 for no choice.
        num_experts: E.
        ep: devices.
        num_slots: slots to fill, E to E·ep; None for one per expert.
        load_slack: most load of a device as a multiple of the mean, where the start is not above it already.

    Returns:
        One placement per layer.

    Raises:
        ValueError: there are fewer slots than experts, or more than E on every device.

    Source: ExFlow (arXiv 2401.08383), with swaps in place of its integer program.
    """
    num_slots = num_experts if num_slots is None else num_slots
    device_slots = even_shares(num_experts, ep, num_slots)
    L = expert_ids.shape[1]
    follow = [transitions(expert_ids[:, layer], expert_ids[:, layer + 1], num_experts) for layer in range(L - 1)]
    placements = affinity(expert_ids[:, :1], num_experts, ep, num_slots=num_slots, load_slack=load_slack)
    replicas = [Replicas(expert_ids[:, layer], num_experts, num_slots, ep) for layer in range(L)]
    device_LP = [pack_distinct(one.weights_P, one.expert_P, device_slots, np.ones(ep)) for one in replicas]
    limits = [one.load_limit(device_P, ep, load_slack) for one, device_P in zip(replicas, device_LP, strict=True)]

    def place(layer: int, worth_ED: np.ndarray) -> ExpertPlacement:
        own = replicas[layer]
        worth_PD = (worth_ED / own.replicas_E[:, None])[own.expert_P]
        device_LP[layer] = gather_by_swaps(
            device_LP[layer], own.weights_P, own.expert_P, limits[layer], device_affinity_ND=worth_PD
        )
        return from_devices(num_experts, own.expert_P, device_LP[layer], device_slots)

    for layer in range(1, L):
        placements.append(place(layer, follow[layer - 1].T @ _shares(placements[layer - 1])))
    # Once more, now that the layer after each is known too.
    for layer in range(1, L - 1):
        before = follow[layer - 1].T @ _shares(placements[layer - 1])
        placements[layer] = place(layer, before + follow[layer] @ _shares(placements[layer + 1]))
    return placements


def _shares(placement: ExpertPlacement) -> np.ndarray:
    """[E, ep], the part of each expert's tokens that each device serves when they take turns over replicas."""
    return placement.device_replicas.T / placement.replica_counts[:, None]


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    assert task.expert_ids is not None
    return layer_affinity(task.expert_ids, task.num_experts, task.ep, num_slots=task.num_slots)


LAYER_AFFINITY = Strategy("layer_affinity", "trace", _make)
