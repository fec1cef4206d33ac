"""Placement on unequal devices: slots by memory, load by speed."""

from collections.abc import Sequence

import numpy as np

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.eplb_uneven import level_loads
from jaxmoe.placement.inputs import check_counts, check_device_slots, check_device_speeds
from jaxmoe.placement.strategy import PlacementTask, Strategy


def weighted(
    counts: np.ndarray,
    ep: int,
    *,
    device_slots: Sequence[int] | None = None,
    device_speeds: Sequence[float] | None = None,
    num_slots: int | None = None,
) -> list[ExpertPlacement]:
    """Give each device as many experts as fit its memory, and load in proportion to its speed.

    Minimizes max over devices of load / speed, greedily. Decoding is bound by memory bandwidth and
    prefill by arithmetic: pass as speed the ratio of whichever limits the workload.

    Args:
        counts: [L, E], the load of each expert in each layer.
        ep: devices.
        device_slots: [ep], slots that each device has room for; None shares out `num_slots` evenly.
        device_speeds: [ep], relative speed of each device; None for equal ones.
        num_slots: slots to fill, used without `device_slots`; None for one per expert.

    Returns:
        One placement per layer. Every device owns as many slots as the largest; smaller ones are padded.

    Raises:
        ValueError: the slots do not hold every expert, or a speed is not above 0.

    Example:
        >>> weighted(np.array([[1, 1, 1, 1]]), ep=2, device_slots=[3, 1])[0].slot_to_expert.tolist()
        [0, 2, 3, 1, -1, -1]
    """
    E = check_counts(counts).shape[-1]
    if device_slots is None:
        filled = E if num_slots is None else num_slots
        slots = np.array([len(block) for block in np.array_split(np.arange(filled), ep)])
    else:
        # More slots than experts on one device would hold doubles only.
        slots = np.minimum(check_device_slots(device_slots), E)
    speeds = np.ones(ep) if device_speeds is None else check_device_speeds(device_speeds)
    if slots.shape != (ep,) or speeds.shape != (ep,):
        raise ValueError(f"device_slots and device_speeds have one entry for each of {ep} devices")
    return level_loads(counts, slots, speeds)


def _make(task: PlacementTask) -> list[ExpertPlacement]:
    assert task.counts is not None
    return weighted(
        task.counts,
        task.ep,
        device_slots=task.device_slots,
        device_speeds=task.device_speeds,
        num_slots=task.num_slots,
    )


WEIGHTED = Strategy("weighted", "counts", _make)
