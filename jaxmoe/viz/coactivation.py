"""A matrix of the experts that fire together."""

import numpy as np
from matplotlib.axes import Axes

from jaxmoe.placement import ExpertPlacement
from jaxmoe.viz.style import SEQUENTIAL, axes_or_new, cased_line, colorbar, integer_ticks


def coactivation_matrix(pairs: np.ndarray, *, placement: ExpertPlacement | None = None, ax: Axes | None = None) -> Axes:
    """Draw how often each pair of experts was chosen by one token, as a multiple of what chance would give.

    Chance is that experts fire independently, each as often as it does: row sum · column sum / total.
    With a placement, experts are drawn device by device, and boxes on the diagonal
    mark each device's own pairs: the lighter inside the boxes, the fewer copies.

    Args:
        pairs: [E, E], from `jaxmoe.placement.coactivation.coactivation`.
        placement: placement of the same layer, to order the experts by; replicas are drawn where their expert is first.
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes.

    Example:
        >>> coactivation_matrix(np.array([[0, 2], [2, 0]])).get_xlabel()
        'expert'
    """
    pairs = np.asarray(pairs, np.float64)
    E = pairs.shape[0]
    chance = np.outer(pairs.sum(axis=1), pairs.sum(axis=0)) / max(pairs.sum(), 1.0)
    lift = np.divide(pairs, chance, out=np.zeros_like(pairs), where=chance > 0)
    np.fill_diagonal(lift, np.nan)
    ax = axes_or_new(ax, 6.0, 5.2)
    order, boxes = (np.arange(E), []) if placement is None else _by_device(placement)
    drawn = lift[np.ix_(order, order)]
    seen = drawn[np.isfinite(drawn)]
    top = max(1.0, float(np.percentile(seen, 99.5))) if seen.size else 1.0
    image = ax.imshow(drawn, interpolation="nearest", cmap=SEQUENTIAL, vmin=0, vmax=top)
    for start, size in boxes:
        square = np.array([start, start + size]) - 0.5
        cased_line(ax, square[[0, 1, 1, 0, 0]], square[[0, 0, 1, 1, 0]], cells=E)
    colorbar(ax, image, "together / by chance")
    label = "expert" if placement is None else "expert, in order of devices (boxes)"
    ax.set(xlabel=label, ylabel=label, xlim=(-0.5, E - 0.5), ylim=(E - 0.5, -0.5))
    if placement is None:
        for axis in (ax.xaxis, ax.yaxis):
            integer_ticks(axis, min(8, E))
    else:
        # Positions are no expert numbers here.
        ax.set(xticks=[], yticks=[])
    return ax


def _by_device(placement: ExpertPlacement) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Experts in order of their first slots, and the start and number of each device's."""
    order = np.argsort(placement.expert_to_slots[:, 0])
    devices = placement.expert_to_slots[order, 0] // placement.slots_per_device
    _, starts, sizes = np.unique(devices, return_index=True, return_counts=True)
    return order, list(zip(starts.tolist(), sizes.tolist(), strict=True))
