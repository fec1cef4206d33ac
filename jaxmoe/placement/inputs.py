"""Checks of the loads and devices that placements are made from."""

from collections.abc import Sequence

import numpy as np


def check_device_slots(device_slots: Sequence[int]) -> np.ndarray:
    """Slots of each device as int64 [ep].

    Raises:
        ValueError: one is below 0 or no integer.
    """
    slots = np.asarray(device_slots)
    if slots.dtype.kind not in "iu" or slots.min() < 0:
        raise ValueError(f"device_slots are integers, at least 0; got {slots.tolist()}")
    return slots.astype(np.int64)


def check_device_speeds(device_speeds: Sequence[float] | np.ndarray) -> np.ndarray:
    """Relative speed of each device as float64 [ep].

    Raises:
        ValueError: one is not above 0, or not finite.
    """
    speeds = np.asarray(device_speeds, np.float64)
    if not (np.isfinite(speeds).all() and speeds.min() > 0):
        raise ValueError(f"device_speeds are finite and above 0; got {speeds.tolist()}")
    return speeds


def check_counts(counts: np.ndarray) -> np.ndarray:
    """`counts` as an array, refused unless it is [E] or [L, E] of finite numbers from 0 up.

    Raises:
        ValueError: another shape, or a number that is no load.
    """
    counts = np.asarray(counts)
    if counts.ndim not in (1, 2) or counts.size == 0 or counts.dtype.kind not in "iuf":
        raise ValueError(f"counts are numbers, [E] or [layers, E]; got {counts.dtype} of shape {counts.shape}")
    if not np.isfinite(counts).all() or counts.min() < 0:
        raise ValueError("counts are loads: finite and at least 0")
    return counts
