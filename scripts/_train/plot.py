"""The loss curve as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from jaxmoe.viz.style import COLORS, LINES, axes_or_new, plain


def loss_curve(log: Sequence[Mapping[str, Any]], baselines: Mapping[str, float], nats: float, file: Path) -> None:
    """Draw training and held-out loss over the steps, in bits per byte, and the baselines as lines.

    Args:
        log: of a `run.Run`.
        baselines: bits per byte by name.
        nats: nats per token that are one bit per byte of this text.
        file: the picture to write.
    """
    ax = axes_or_new(None, 7.0, 4.0)
    for name, key, color, marker in (
        ("training", "loss", COLORS[4], ""),
        ("held out", "held_out_loss", COLORS[0], "o"),
    ):
        points = [(record["step"], record[key] / nats) for record in log if key in record]
        steps, bits = [step for step, _ in points], [bits for _, bits in points]
        ax.plot(steps, bits, color=color, marker=marker, markersize=3, linewidth=1.2, label=name)
    for number, (name, bits) in enumerate(baselines.items()):
        ax.axhline(bits, color="black", linewidth=0.8, linestyle=LINES[1 + number % 3], label=name)
    ax.set(xlabel="step", ylabel="bits per byte", ylim=(0.5, 4))
    ax.legend(frameon=False, ncols=2)
    plain(ax)
    ax.figure.savefig(file, dpi=120)
    plt.close("all")
