"""Ownership: the slots of every device and the experts in them."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from jaxmoe.placement import ExpertPlacement
from jaxmoe.placement.nodes import check_nodes
from jaxmoe.viz.style import COLORS, axes_or_new

_MAX_WIDTH, _MAX_LINES = 24, 40
_ONLY: dict[str, Any] = {"facecolor": "#DCE9F5", "edgecolor": "0.6", "linewidth": 0.5}
_REPLICA: dict[str, Any] = {"facecolor": COLORS[1], "edgecolor": "black", "linewidth": 1.0}
_PADDING: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.7", "linewidth": 0.5, "hatch": "////"}


def ownership_map(placement: ExpertPlacement, *, num_nodes: int = 1, ax: Axes | None = None) -> Axes:
    """Draw every slot with the number of the expert in it, a block a device, replicated experts marked.

    A device with more than 24 slots takes several lines; many devices stand in several columns.

    Args:
        placement: placement of one layer.
        num_nodes: nodes that the devices are on; a line parts them.
        ax: axes to draw in; None for a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: the devices do not split into that many nodes.

    Example:
        >>> [text.get_text() for text in ownership_map(ExpertPlacement.linear(num_experts=3, ep=2)).texts]
        ['device 0', '0', '1', 'device 1', '2']
    """
    n, p = placement.ep, placement.slots_per_device
    devices_per_node = check_nodes(n, num_nodes)
    width = min(p, _MAX_WIDTH)
    lines = -(-p // width)
    columns = min(n, -(-n * lines // _MAX_LINES))
    rows = -(-n // columns)
    label_width, gap = 2.2, 0.8
    column_width = label_width + width + gap
    # Cells of 0.4 by 0.25 inches hold three digits of 7 points.
    ax = axes_or_new(ax, max(4.5, 0.4 * (columns * column_width - gap) + 0.2), 0.25 * rows * (lines + 0.2) + 0.6)
    for device in range(n):
        left = (device // rows) * column_width + label_width
        top = (device % rows) * (lines + 0.2)
        ax.text(left - 0.7, top, f"device {device}", ha="right", va="center", fontsize=7)
        if device and device % devices_per_node == 0:
            ax.plot([left - label_width, left + width - 0.5], [top - 0.6] * 2, color="black", linewidth=1.5)
        for place, expert in enumerate(placement.slot_to_expert[device * p : (device + 1) * p]):
            _draw_slot(ax, left + place % width, top + place // width, int(expert), placement)
    ax.set(xlim=(-0.2, columns * column_width - gap - 0.3), ylim=(rows * (lines + 0.2) - 0.4, -0.8))
    ax.set_axis_off()
    kinds = [Patch(label="only copy", **_ONLY)]
    if placement.replica_counts.max() > 1:
        kinds.append(Patch(label="one of several replicas", **_REPLICA))
    if placement.num_padding:
        kinds.append(Patch(label="padding", **_PADDING))
    ax.legend(handles=kinds, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize="small")
    return ax


def _draw_slot(ax: Axes, x: float, y: float, expert: int, placement: ExpertPlacement) -> None:
    replicated = expert >= 0 and placement.replica_counts[expert] > 1
    look = _PADDING if expert < 0 else _REPLICA if replicated else _ONLY
    ax.add_patch(Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, **look))
    if expert >= 0:
        weight = "bold" if replicated else "normal"
        ax.text(x, y, str(expert), ha="center", va="center", fontsize=7, weight=weight)
