"""A matrix of the bytes that devices send each other."""

import numpy as np
from matplotlib.axes import Axes

from jaxmoe.placement.nodes import check_nodes
from jaxmoe.viz.style import SEQUENTIAL, axes_or_new, cased_line, colorbar, integer_ticks, text_color

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "bytes"))


def traffic_matrix(copies: np.ndarray, token_bytes: float, *, num_nodes: int = 1, ax: Axes | None = None) -> Axes:
    """Draw the bytes that each device sends to each other.

    Args:
        copies: [n, n] token copies, or [L, n, n] to be summed (`Traffic.copies`); the diagonal, tokens
            that stay at home, is left blank.
        token_bytes: bytes of one copy.
        num_nodes: nodes that the devices are on; lines part them.
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: the devices do not split into that many nodes.

    Example:
        >>> traffic_matrix(np.array([[5, 2], [1, 5]]), token_bytes=4096).get_ylabel()
        'from device'
    """
    copies = np.asarray(copies, np.float64)
    sent = copies.reshape(-1, *copies.shape[-2:]).sum(axis=0) * token_bytes
    n = sent.shape[0]
    devices_per_node = check_nodes(n, num_nodes)
    np.fill_diagonal(sent, np.nan)
    most = float(np.nanmax(sent)) if n > 1 else 0.0
    scale, unit = next(((size, name) for size, name in _UNITS if most >= size), _UNITS[-1])
    sent /= scale
    ax = axes_or_new(ax, 5.8, 5.0)
    image = ax.imshow(sent, interpolation="nearest", cmap=SEQUENTIAL, vmin=0, vmax=most / scale or 1.0)
    ax.set_facecolor("0.85")  # Shows through where nothing is sent.
    if n <= 12:
        for source, target in np.argwhere(np.isfinite(sent)):
            value = sent[source, target]
            ax.text(
                target, source, f"{value:.3g}", ha="center", va="center", fontsize=8, color=text_color(image, value)
            )
    for node in range(1, num_nodes):
        edge = node * devices_per_node - 0.5
        cased_line(ax, [-0.5, n - 0.5], [edge, edge], cells=n)
        cased_line(ax, [edge, edge], [-0.5, n - 0.5], cells=n)
    colorbar(ax, image, f"{unit} sent")
    ax.set(xlabel="to device", ylabel="from device")
    for axis in (ax.xaxis, ax.yaxis):
        integer_ticks(axis, min(12, n))
    return ax
