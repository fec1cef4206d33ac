"""The bound on replica choice: the lowest maximum load that any split over replicas can reach."""

from typing import NamedTuple

import numpy as np

from jaxmoe.placement.base import ExpertPlacement


class Split(NamedTuple):
    """An optimal fractional split.

    Attributes:
        max_load: the highest load / speed of a device.
        slot_load: float64 [P], the load each slot is given.
    """

    max_load: float
    slot_load: np.ndarray


def optimal_split(counts: np.ndarray, placement: ExpertPlacement, *, device_speeds: np.ndarray | None = None) -> Split:
    """Split each expert's load over its replicas so that the busiest device has as little as possible.

    The linear program: minimize z over slot loads x ≥ 0 with Σ over an expert's slots of x = its
    count, and Σ over a device's slots of x ≤ z · speed. Tokens cannot be split and a dispatch does
    not know the counts beforehand, so this is a bound to hold replica choices against.

    Args:
        counts: [E], the load of each expert.
        placement: placement of the layer.
        device_speeds: [ep], relative speed of each device; None for equal ones.

    Returns:
        The bound and a split that reaches it.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: counts are not of the placement's experts.

    Example:
        >>> p = ExpertPlacement(num_experts=2, ep=2, slot_to_expert=[0, -1, 1, 0])
        >>> optimal_split(np.array([9, 3]), p).max_load
        6.0
    """
    try:
        from scipy import sparse
        from scipy.optimize import linprog
    except ImportError as error:
        raise ImportError("the optimal split is a linear program solved by SciPy: pip install scipy") from error

    counts = np.asarray(counts, np.float64)
    if counts.shape != (placement.num_experts,):
        raise ValueError(f"counts are of the placement's {placement.num_experts} experts; got shape {counts.shape}")
    speeds = np.ones(placement.ep) if device_speeds is None else np.asarray(device_speeds, np.float64)
    scale = counts.sum() or 1.0
    slots = np.flatnonzero(placement.slot_to_expert >= 0)
    n, columns = slots.size, np.arange(slots.size)
    ones = np.ones(n)
    # Variables: the load of each filled slot, then z.
    per_expert = sparse.csr_matrix(
        (ones, (placement.slot_to_expert[slots], columns)), shape=(placement.num_experts, n + 1)
    )
    per_device = sparse.csr_matrix((ones, (slots // placement.slots_per_device, columns)), shape=(placement.ep, n))
    solved = linprog(
        np.append(np.zeros(n), 1.0),
        A_ub=sparse.hstack([per_device, sparse.csr_matrix(-speeds[:, None])], format="csr"),
        b_ub=np.zeros(placement.ep),
        A_eq=per_expert,
        b_eq=counts / scale,
        method="highs",
    )
    assert solved.status == 0, solved.message
    load = np.zeros(placement.num_slots)
    load[slots] = solved.x[:n] * scale
    return Split(float(solved.x[n] * scale), load)


def optimal_max_load(
    counts: np.ndarray, placement: ExpertPlacement, *, device_speeds: np.ndarray | None = None
) -> float:
    """`optimal_split`'s bound alone."""
    return optimal_split(counts, placement, device_speeds=device_speeds).max_load
