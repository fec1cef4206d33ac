"""Memory by device."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from jaxmoe.placement import ExpertPlacement
from jaxmoe.viz.style import COLORS, HATCHES, axes_or_new, integer_ticks, plain


def device_memory(parts: Mapping[str, np.ndarray], *, capacity: float | None = None, ax: Axes | None = None) -> Axes:
    """Draw what fills each device's memory, stacked.

    Args:
        parts: label to [n] bytes, from the bottom up; `expert_memory` gives those of the experts.
        capacity: bytes of a device's memory, drawn as a line; None for no line.
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: there is no part, or they are of different numbers of devices.

    Example:
        >>> device_memory({"experts": np.array([3e9, 2e9])}).get_ylabel()
        'GB'
    """
    if len({np.size(sizes) for sizes in parts.values()}) != 1:
        raise ValueError(f"parts are of the same devices; got { ({label: np.size(s) for label, s in parts.items()}) }")
    n = np.size(next(iter(parts.values())))
    ax = axes_or_new(ax, min(12.0, max(7.0, 3.5 + 0.3 * n)), 3.6)
    bottom = np.zeros(n)
    for number, (label, sizes) in enumerate(parts.items()):
        height = np.asarray(sizes, np.float64) / 1e9
        ax.bar(
            np.arange(n),
            height,
            0.8,
            bottom=bottom,
            color=COLORS[number % len(COLORS)],
            hatch=HATCHES[number % len(HATCHES)],
            edgecolor="black",
            linewidth=0.4,
            label=label,
        )
        bottom += height
    if capacity is not None:
        ax.axhline(capacity / 1e9, color="black", linewidth=1.2, linestyle="--", label="capacity")
    ax.set(xlabel="device", ylabel="GB", xlim=(-0.6, n - 0.4))
    integer_ticks(ax.xaxis, min(16, n + 1))
    ax.set_ylim(0, ax.get_ylim()[1] * 1.05)
    # At the right, as the parts are stacked: above the bars a legend of many parts would be wider than a few bars.
    handles, labels = ax.get_legend_handles_labels()
    order = [*range(len(handles) - len(parts)), *reversed(range(len(handles) - len(parts), len(handles)))]
    ax.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        fontsize="small",
    )
    return plain(ax)


def expert_memory(placements: Sequence[ExpertPlacement], expert_bytes: float) -> dict[str, np.ndarray]:
    """Bytes of each device's slots over all layers: experts, the replicas beyond one of each, and padding.

    Args:
        placements: placement of each layer.
        expert_bytes: bytes of one expert.

    Returns:
        "experts", "replicas" and "padding", each float64 [n].

    Example:
        >>> p = ExpertPlacement(num_experts=2, ep=2, slot_to_expert=[0, -1, 1, 0])
        >>> {name: sizes.tolist() for name, sizes in expert_memory([p], 10).items()}
        {'experts': [10.0, 10.0], 'replicas': [0.0, 10.0], 'padding': [10.0, 0.0]}
    """
    layers = [placement.slot_uses for placement in placements]
    return {
        use: np.sum([slots[use] for slots in layers], axis=0) * float(expert_bytes)
        for use in ("experts", "replicas", "padding")
    }
