"""Co-activation affinity: experts that fire together live together.

Letters here, beside the common ones of docs/concepts/letters.md: X problems solved side by side, N items that are
paired.
"""

import numpy as np

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.coactivation import coactivation
from jaxmoe.placement.distinct_packing import pack_distinct
from jaxmoe.placement.eplb_uneven import from_devices
from jaxmoe.placement.packing import replicate_experts
from jaxmoe.placement.strategy import PlacementTask, Strategy
from jaxmoe.placement.swaps import gather_by_swaps


def affinity(
    expert_ids: np.ndarray, num_experts: int, ep: int, *, num_slots: int | None = None, load_slack: float = 1.1
) -> list[ExpertPlacement]:
    """Place experts so that a token's K choices are on few devices, without overloading one.

    A token that finds two of its experts on one device is sent there once. Counting the pairs of
    experts that tokens chose together, A[e, f], this maximizes Σ A[e, f] over pairs on one device, by swaps from
    a load-levelled start. Replicas share their expert's pairs evenly and stay on different devices.

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

    Example:
        >>> ids = np.array([[[0, 2]], [[1, 3]], [[2, 0]], [[3, 1]]])
        >>> sorted(affinity(ids, num_experts=4, ep=2)[0].device_experts(0))
        [0, 2]
    """
    num_slots = num_experts if num_slots is None else num_slots
    device_slots = even_shares(num_experts, ep, num_slots)
    placements = []
    for ids_TK in expert_ids.transpose(1, 0, 2):
        replicas = Replicas(ids_TK, num_experts, num_slots, ep)
        pairs_EE = coactivation(ids_TK, num_experts)
        start_P = pack_distinct(replicas.weights_P, replicas.expert_P, device_slots, np.ones(ep))
        limit = replicas.load_limit(start_P, ep, load_slack)
        shared_EE = pairs_EE / (replicas.replicas_E[:, None] * replicas.replicas_E)
        shared_PP = shared_EE[replicas.expert_P][:, replicas.expert_P]
        device_P = gather_by_swaps(start_P, replicas.weights_P, replicas.expert_P, limit, pair_affinity_NN=shared_PP)
        placements.append(from_devices(num_experts, replicas.expert_P, device_P, device_slots))
    return placements


class Replicas:
    """The replicas of one layer's experts: how many, of which expert, how heavy.

    Args:
        ids_TK: integers [T, K], the layer's choices.
        num_experts: E.
        num_slots: replicas P.
        ep: devices, the most replicas of one expert.
    """

    def __init__(self, ids_TK: np.ndarray, num_experts: int, num_slots: int, ep: int) -> None:
        # Experts that were never chosen count a little, so that spare slots go round among them.
        counts_E = np.bincount(ids_TK[ids_TK >= 0], minlength=num_experts) + 1e-6
        expert_XP, replicas_XE = replicate_experts(counts_E[None].astype(np.float32), num_slots, max_replicas=ep)
        self.expert_P, self.replicas_E = expert_XP[0], replicas_XE[0]
        self.weights_P = (counts_E / self.replicas_E)[self.expert_P]

    def load_limit(self, device_P: np.ndarray, ep: int, slack: float) -> float:
        """Most load a device may come to: `slack` times the mean, or what it is in `device_P` if that is more."""
        load = np.bincount(device_P, weights=self.weights_P, minlength=ep)
        return float(max(load.max(), slack * load.mean()))


def even_shares(num_experts: int, ep: int, num_slots: int) -> np.ndarray:
    """int64 [ep], `num_slots` shared out with the remainder on the lowest devices.

    Raises:
        ValueError: there are fewer slots than experts, or a device would hold an expert twice.
    """
    if not num_experts <= num_slots <= num_experts * ep:
        raise ValueError(
            f"every expert needs a slot and no device needs an expert twice: num_slots is {num_experts} to "
            f"{num_experts * ep} for {num_experts} experts on {ep} devices; got {num_slots}"
        )
    return np.array([len(block) for block in np.array_split(np.arange(num_slots), ep)])


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    assert task.expert_ids is not None
    return affinity(task.expert_ids, task.num_experts, task.ep, num_slots=task.num_slots)


AFFINITY = Strategy("affinity", "trace", _make)
