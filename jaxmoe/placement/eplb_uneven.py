"""EPLB for any number of slots: uneven experts per device, no two replicas of one expert on a device."""

from collections.abc import Sequence

import numpy as np

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.distinct_packing import pack_distinct
from jaxmoe.placement.inputs import check_counts
from jaxmoe.placement.packing import replicate_experts
from jaxmoe.placement.strategy import PlacementTask, Strategy


def eplb_uneven(counts: np.ndarray, ep: int, *, num_slots: int | None = None) -> list[ExpertPlacement]:
    """Level loads over devices that differ by at most one expert.

    As EPLB, with three differences: `num_slots` need not be a multiple of `ep` (60 experts on 8
    devices need no replica, and 61 slots are possible), replicas of an expert are always on
    different devices, and swaps level what greedy packing leaves.

    Args:
        counts: [L, E], the load of each expert in each layer.
        ep: devices.
        num_slots: slots to fill, E to E·ep; None for one per expert.

    Returns:
        One placement per layer, the devices with fewer experts padded.

    Raises:
        ValueError: there are fewer slots than experts, or more than E on every device.

    Example:
        >>> eplb_uneven(np.array([[1, 6, 2]]), ep=2, num_slots=4)[0].slot_to_expert.tolist()
        [1, 2, 0, 1]
    """
    E = check_counts(counts).shape[-1]
    num_slots = E if num_slots is None else num_slots
    blocks = np.array_split(np.arange(num_slots), ep)
    return level_loads(counts, np.array([len(block) for block in blocks]), np.ones(ep))


def level_loads(counts: np.ndarray, device_slots: np.ndarray, device_speeds: np.ndarray) -> list[ExpertPlacement]:
    """Fill `device_slots` [ep] with replicas so that load / `device_speeds` [ep] is level in each layer of `counts` [L, E].

    Raises:
        ValueError: there are fewer slots than experts, or a device has more slots than there are experts.
    """
    counts_LE = np.atleast_2d(check_counts(counts))
    E, num_slots = counts_LE.shape[1], int(device_slots.sum())
    if num_slots < E:
        raise ValueError(f"every expert needs a slot: there are {num_slots} slots for num_experts={E}")
    if device_slots.max() > E:
        raise ValueError(
            f"a device holds an expert at most once: num_experts={E} cannot fill the {device_slots.max()} slots of "
            f"device {device_slots.argmax()}; ask for fewer slots"
        )
    # An expert that was never chosen still counts a little: spare slots then go round instead of all to expert 0.
    mean_L1 = counts_LE.mean(axis=1, keepdims=True)
    weights_LE = counts_LE + 1e-6 * np.where(mean_L1 > 0, mean_L1, 1)
    ready = int(np.count_nonzero(device_slots))
    expert_LP, replicas_LE = replicate_experts(weights_LE.astype(np.float32), num_slots, max_replicas=ready)
    share_LE = weights_LE / replicas_LE
    placements = []
    for share_E, expert_P in zip(share_LE, expert_LP, strict=True):
        device_P = pack_distinct(share_E[expert_P], expert_P, device_slots, device_speeds)
        placements.append(from_devices(E, expert_P, device_P, device_slots))
    return placements


def from_devices(
    num_experts: int, expert_P: Sequence[int] | np.ndarray, device_P: np.ndarray, device_slots: np.ndarray
) -> ExpertPlacement:
    """The placement that has replica i, of expert `expert_P[i]`, on device `device_P[i]` (-1: nowhere)."""
    expert_P = np.asarray(expert_P)
    slots = np.full((device_slots.size, int(device_slots.max())), -1, np.int32)
    for device in range(device_slots.size):
        held = expert_P[device_P == device]
        slots[device, : held.size] = held
    return ExpertPlacement(num_experts, device_slots.size, slots.reshape(-1))


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    assert task.counts is not None
    return eplb_uneven(task.counts, task.ep, num_slots=task.num_slots)


EPLB_UNEVEN = Strategy("eplb_uneven", "counts", _make)
