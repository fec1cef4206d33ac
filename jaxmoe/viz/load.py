"""Load by device, before and after."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from jaxmoe.viz.style import COLORS, HATCHES, axes_or_new, integer_ticks, plain


def device_loads(loads: Mapping[str, np.ndarray], *, ax: Axes | None = None) -> Axes:
    """Draw each device's load, as a multiple of the mean, with a bar per placement.

    Args:
        loads: label to [n] loads, such as ``{"linear": ..., "eplb": ...}``. A [..., n] array is summed
            over its leading dims first.
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes. The legend gives each placement's max / mean.

    Raises:
        ValueError: there are no loads, or they are of different numbers of devices.

    Example:
        >>> ax = device_loads({"before": np.array([3, 1]), "after": np.array([2, 2])})
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['before (max/mean 1.50)', 'after (max/mean 1.00)', 'mean']
    """
    totals = {
        label: (array := np.asarray(values, np.float64)).reshape(-1, array.shape[-1]).sum(axis=0)
        for label, values in loads.items()
    }
    if len({total.size for total in totals.values()}) != 1:
        raise ValueError(f"loads are of the same devices; got { ({label: t.size for label, t in totals.items()}) }")
    n = next(iter(totals.values())).size
    ax = axes_or_new(ax, min(12.0, max(7.0, 2.0 + 0.25 * n * len(totals))), 3.6)
    width = 0.8 / len(totals)
    for number, (label, total) in enumerate(totals.items()):
        relative = total / total.mean() if total.any() else total
        ax.bar(
            np.arange(n) + (number - (len(totals) - 1) / 2) * width,
            relative,
            width,
            color=COLORS[number % len(COLORS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="white" if number == 0 else "black",
            linewidth=0.4,
            label=f"{label} (max/mean {relative.max():.2f})",
        )
    ax.axhline(1.0, color="black", linewidth=1, linestyle="--", label="mean")
    ax.set(xlabel="device", ylabel="load / mean", xlim=(-0.6, n - 0.4))
    integer_ticks(ax.xaxis, min(16, n + 1))
    ax.set_ylim(0, ax.get_ylim()[1] * 1.25)  # Room for the legend above the bars.
    handles, labels = ax.get_legend_handles_labels()
    order = [*range(1, len(handles)), 0]
    ax.legend([handles[i] for i in order], [labels[i] for i in order], loc="upper right", ncols=2, frameon=False)
    return plain(ax)
