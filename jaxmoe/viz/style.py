"""What the plots share: colours, hatches, a figure where none is given."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.image import AxesImage
from numpy.typing import ArrayLike

# Okabe and Ito's palette (2008), ordered so that neighbours differ in lightness as well.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")

# Lightness rises evenly, also to the colour-blind: it prints in grey as it looks.
SEQUENTIAL = "cividis"


def axes_or_new(ax: Axes | None, width: float = 7.0, height: float = 4.0) -> Axes:
    """`ax`, or the axes of a new figure of that size in inches."""
    if ax is not None:
        return ax
    _, new = plt.subplots(figsize=(width, height), layout="constrained")
    return new


def plain(ax: Axes) -> Axes:
    """Take away the frame's top and right sides."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def colorbar(ax: Axes, image: AxesImage, label: str) -> Colorbar:
    """A colour scale at the right of `ax`."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    bar.set_label(label)
    return bar


def text_color(image: AxesImage, value: float) -> str:
    """Black or white, whichever reads better on the colour that `image` gives to `value`."""
    red, green, blue, _ = image.to_rgba(np.array([value]))[0]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def cased_line(ax: Axes, xs: ArrayLike, ys: ArrayLike) -> None:
    """A thin black line in a white casing, which shows on any colour under it, in print too."""
    ax.plot(xs, ys, color="white", linewidth=3, solid_joinstyle="miter", scalex=False, scaley=False)
    ax.plot(xs, ys, color="black", linewidth=1.2, solid_joinstyle="miter", scalex=False, scaley=False)
