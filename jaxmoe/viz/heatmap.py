"""Popularity of experts, layer by layer."""

import numpy as np
from matplotlib.axes import Axes

from jaxmoe.viz.style import SEQUENTIAL, axes_or_new, colorbar, integer_ticks


def expert_heatmap(counts: np.ndarray, *, sort: bool = False, ax: Axes | None = None) -> Axes:
    """Draw each expert's load in each layer, as a multiple of the layer's mean.

    Args:
        counts: [L, E], number of times that each expert was chosen (`RoutingTrace.total_counts`).
        sort: flag that orders each layer's experts by load, which shows the skew rather than who.
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes.

    Example:
        >>> expert_heatmap(np.array([[3, 1, 0, 4]])).get_ylabel()
        'MoE layer'
    """
    counts = np.atleast_2d(np.asarray(counts, np.float64))
    L, E = counts.shape
    ax = axes_or_new(ax, 8.0, min(8.0, 1.8 + 0.18 * L))
    relative = counts / np.maximum(counts.mean(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    if sort:
        relative = -np.sort(-relative, axis=1)
    # A handful of outliers would leave the rest one color; the arrow of the scale says that they are cut off.
    top = max(1.0, float(np.percentile(relative, 99.5)))
    image = ax.imshow(relative, aspect="auto", interpolation="nearest", cmap=SEQUENTIAL, vmin=0, vmax=top)
    bar = colorbar(ax, image, "load / layer mean")
    if relative.max() > top:
        bar.ax.set_title(f"max {relative.max():.1f}", fontsize="small", loc="left")
    ax.set(xlabel="expert, by load" if sort else "expert", ylabel="MoE layer")
    for axis, size in ((ax.xaxis, E), (ax.yaxis, L)):
        integer_ticks(axis, min(10, size))
    return ax
