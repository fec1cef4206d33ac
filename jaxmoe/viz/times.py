"""Modeled time of a step by mesh."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from jaxmoe.planning import MeshChoice
from jaxmoe.planning.roofline import Phase
from jaxmoe.viz.style import COLORS, HATCHES, axes_or_new, plain


def step_times(choices: Sequence[MeshChoice], phase: Phase = "decode", *, ax: Axes | None = None) -> Axes:
    """Draw what the modeled time of a step is made of, a bar for each mesh, the first at the top.

    Args:
        choices: meshes, as `jaxmoe.planning.search_meshes` gives them.
        phase: "decode" or "prefill".
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: there are no choices.
    """
    if not choices:
        raise ValueError("there is a bar for each mesh; got no mesh")
    steps = [getattr(choice, phase) for choice in choices]
    ax = axes_or_new(ax, 9.0, 1.2 + 0.34 * len(choices))
    left = np.zeros(len(choices))
    for number, name in enumerate(("dense", "experts", "cache", "exchange", "sums")):
        width = np.array([getattr(step, name) for step in steps]) * 1e3
        ax.barh(
            np.arange(len(choices)),
            width,
            0.75,
            left=left,
            color=COLORS[number],
            hatch=HATCHES[number],
            edgecolor="black",
            linewidth=0.4,
            label=name,
        )
        left += width
    ax.set_yticks(np.arange(len(choices)), [str(choice) for choice in choices], fontsize="small")
    ax.invert_yaxis()
    ax.set_xlabel(f"ms of a {phase} step, modeled")
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return plain(ax)
