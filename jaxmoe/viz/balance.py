"""Balance over time."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from jaxmoe.placement.balance import max_over_mean
from jaxmoe.viz.style import COLORS, LINES, MARKERS, axes_or_new, integer_ticks, plain


def balance_over_time(
    loads: Mapping[str, np.ndarray], *, changes: Mapping[int, str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw how uneven the devices are in each window: max / mean, averaged over layers, a line per placement.

    Args:
        loads: label to [W, L, n] loads (`Traffic.rows`, or `device_loads` of a trace's counts).
        changes: window to a word, for events such as a rebalance; each is a vertical line before its window.
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: there are no loads.

    Example:
        >>> balance_over_time({"linear": np.array([[[3, 1]], [[2, 2]]])}).get_lines()[0].get_ydata().tolist()
        [1.5, 1.0]
    """
    if not loads:
        raise ValueError("there are no loads to draw")
    ax = axes_or_new(ax, 7.0, 3.6)
    for number, (label, load) in enumerate(loads.items()):
        ratio = max_over_mean(np.asarray(load, np.float64)).mean(axis=1)
        ax.plot(
            ratio,
            label=label,
            color=COLORS[number % len(COLORS)],
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            markevery=max(1, ratio.size // 24),
        )
    ax.set_ylim(min(0.9, ax.get_ylim()[0]), ax.get_ylim()[1] + 0.12 * np.ptp(ax.get_ylim()))  # Room for the words.
    for window, word in (changes or {}).items():
        ax.axvline(window - 0.5, color="0.4", linewidth=1)
        ax.annotate(
            word,
            (window - 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            fontsize="small",
            color="0.3",
        )
    ax.axhline(1.0, color="black", linewidth=0.8, linestyle=(0, (1, 3)))
    ax.set(xlabel="window", ylabel="max / mean device load")
    integer_ticks(ax.xaxis, 9)
    ax.legend(frameon=False, ncols=min(4, max(1, len(loads))), loc="lower left", bbox_to_anchor=(0, 1))
    return plain(ax)
