"""Skew of every layer by placement."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from jaxmoe.planning import PlacementChoice
from jaxmoe.viz.style import COLORS, LINES, MARKERS, axes_or_new, integer_ticks, plain


def skew_by_layer(choices: Sequence[PlacementChoice], *, ax: Axes | None = None) -> Axes:
    """Draw the most rows of a device over their mean in each MoE layer, a line for each placement.

    Args:
        choices: placements, as `jaxmoe.planning.compare_placements` gives them for a trace.
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: there are no choices, or they were made without a trace.
    """
    if not choices or not all(choice.skew for choice in choices):
        raise ValueError("there is a line for each placement that was judged by a trace; got none, or no trace")
    ax = axes_or_new(ax, 9.0, 3.6)
    several = len({choice.redundancy for choice in choices}) > 1
    for number, choice in enumerate(choices):
        ax.plot(
            range(len(choice.skew)),
            choice.skew,
            color=COLORS[number % len(COLORS)],
            linestyle=LINES[number % len(LINES)],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=f"{choice.placement}, {choice.redundancy} redundant" if several else choice.placement,
        )
    ax.axhline(1, color="gray", linewidth=0.8)
    integer_ticks(ax.xaxis, 16)
    ax.set(xlabel="MoE layer", ylabel="most rows / mean")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return plain(ax)
