"""Colors, hatches and axes that the plots share."""

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colorbar import Colorbar
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

# Okabe and Ito's palette (2008), ordered so that neighbors differ in lightness as well.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")

# Lightness rises evenly, also to the color-blind: it prints in gray as it looks.
SEQUENTIAL = "cividis"


def axes_or_new(ax: Axes | None, width: float = 7.0, height: float = 4.0) -> Axes:
    """`ax`, or the axes of a new figure of that size in inches."""
    if ax is not None:
        return ax
    # Not "constrained": beside a square matrix that one leaves the labels no room within the figure.
    _, new = plt.subplots(figsize=(width, height), layout="compressed")
    return new


def plain(ax: Axes) -> Axes:
    """Take away the frame's top and right sides."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def colorbar(ax: Axes, image: AxesImage, label: str) -> Colorbar:
    """A color scale at the right of `ax`; it ends in an arrow where values are beyond it."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    values = image.get_array()
    assert values is not None
    most = np.nanmax(np.ma.filled(values, np.nan), initial=0.0)
    bar = figure.colorbar(
        image, ax=ax, fraction=0.04, pad=0.02, extend="max" if most > image.get_clim()[1] else "neither"
    )
    bar.set_label(label)
    return bar


def text_color(image: AxesImage, value: float) -> str:
    """Black or white, whichever reads better on the color that `image` gives to `value`."""
    red, green, blue, _ = image.to_rgba(np.array([value]))[0]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


def cased_line(ax: Axes, xs: ArrayLike, ys: ArrayLike, *, cells: int) -> None:
    """A thin black line in a white casing, which shows on any color under it, in print too.

    Over a matrix of many `cells` a side it is thinner, so that it hides none.
    """
    scale = min(1.0, 96 / cells)
    ax.plot(xs, ys, color="white", linewidth=3 * scale, solid_joinstyle="miter", scalex=False, scaley=False)
    ax.plot(xs, ys, color="black", linewidth=1.2 * scale, solid_joinstyle="miter", scalex=False, scaley=False)


def integer_ticks(axis: Axis, most: int) -> None:
    """Ticks at integers, a few more than `most` of them at most; a single one where there is a single number."""
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))
