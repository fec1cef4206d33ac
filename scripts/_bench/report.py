"""Results for people and for programs: tables, JSON, a roofline."""

import importlib.metadata
import json
import math
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jaxmoe.kernels.grouped_matmul.work import TOLERANCES

# A side that cannot do a case says it in an exception; these are meant for people.
SPOKEN = (NotImplementedError, MemoryError)
PACKAGES = (
    *("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy", "rich"),
    *("torch", "triton", "transformers", "tokamax"),
)


def machine(device: jax.Device) -> dict[str, Any]:
    """What the figures belong to; the load says whether other programs were at work."""
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def warn_if_busy(here: Mapping[str, Any]) -> None:
    """Say so on stderr where other programs share the CPU that is measured."""
    if here["platform"] == "cpu" and here["load"] > here["cpus"] / 4:
        busy = f"other programs are at work (load {here['load']} on {here['cpus']} CPUs)"
        print(f"· {busy}: these figures mean little", file=sys.stderr, flush=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def reason(refusal: Exception) -> str:
    """The first line of what a side said."""
    text = (str(refusal).strip().splitlines() or [""])[0]
    return text if text and isinstance(refusal, SPOKEN) else f"{type(refusal).__name__}: {text}"


def check_finite(error: float) -> float:
    """An error, for JSON has no NaN and a time says nothing of a result that is none.

    Raises:
        ArithmeticError: it is infinite or NaN.
    """
    if not math.isfinite(error):
        raise ArithmeticError("the result is not finite")
    return error


def check_error(error: float, dtype: str) -> float:
    """An error of products of rows of that dtype that rounding explains, for the time of a wrong result says nothing.

    Raises:
        ArithmeticError: it is infinite or NaN, or more than that.
    """
    if check_finite(error) > TOLERANCES[dtype]:
        raise ArithmeticError(f"the result is wrong: {error:.2g} of its norm, where {TOLERANCES[dtype]:.2g} is allowed")
    return error


def write_json(file: Path, value: Any) -> None:
    """All of it, or the old file."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(json.dumps(value, indent=1) + "\n")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


COLUMNS = ("ms", "TFLOP/s", "GB/s", "of floor", "error", "to the fastest")


def print_cases(console: Console, title: str, cases: Sequence[Mapping[str, Any]]) -> None:
    """One table: a section for each case, a line for each side, those that refuse with their reason."""
    table = Table(title=title, title_justify="left")
    table.add_column("tokens", justify="right")
    table.add_column("routing")
    table.add_column("side", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    refusals = []
    for case in cases:
        table.add_section()
        table.add_row(str(case["tokens"]), case["routing"], "floor", f"{case['floor_seconds'] * 1e3:.3f}")
        timed = [side for side in case["sides"] if "seconds" in side]
        fastest = min((side["seconds"] for side in timed), default=0.0)
        for side in timed:
            table.add_row("", "", side["side"], *cells(case, side, fastest))
        for side in case["sides"]:
            if "refused" in side:
                refusals.append((f"{case['tokens']} {case['routing']}", f"{side['side']}: {side['refused']}"))
    console.print(table)
    print_refusals(console, refusals, everywhere=len(cases))


def print_refusals(console: Console, refusals: Iterable[tuple[str, str]], *, everywhere: int = 0) -> None:
    """Each reason once.

    Args:
        console: where to.
        refusals: what refused, or where, and the reason.
        everywhere: a reason that comes up so often needs no list of places.
    """
    places: dict[str, list[str]] = {}
    for place, reason in refusals:
        places.setdefault(reason, []).append(place)
    for reason, where in places.items():
        listed = "" if len(where) == everywhere else f" ({', '.join(where)})"
        console.print(f"refused: {reason}{listed}", highlight=False, markup=False)


def cells(case: Mapping[str, Any], side: Mapping[str, Any], fastest: float) -> tuple[str, ...]:
    """What stands under `COLUMNS` for a side that was timed."""
    seconds = side["seconds"]
    return (
        f"{seconds * 1e3:.3f}",
        f"{case['flops'] / seconds / 1e12:.3g}",
        f"{case['bytes'] / seconds / 1e9:.3g}",
        f"{case['floor_seconds'] / seconds:.0%}",
        f"{side['error']:.1e}",
        f"{seconds / fastest:.2f}",
    )


def plot_roofline(file: Path, cases: Sequence[Mapping[str, Any]]) -> None:
    """Operations a second over operations a byte, a marker for each side, under the ceilings that were measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from jaxmoe.viz.style import COLORS, LINES, MARKERS, axes_or_new, plain

    ax = axes_or_new(None, 8.0, 5.0)
    points: dict[str, list[tuple[float, float]]] = {}
    for case in cases:
        for side in case["sides"]:
            if "seconds" in side:
                point = case["flops"] / case["bytes"], case["flops"] / side["seconds"]
                points.setdefault(side["side"], []).append(point)
    for number, (name, xy) in enumerate(points.items()):
        marker, color = MARKERS[number % len(MARKERS)], COLORS[number % len(COLORS)]
        ax.plot(*zip(*xy, strict=True), marker, color=color, markersize=4, alpha=0.8, label=name)
    intensities = [case["flops"] / case["bytes"] for case in cases]
    low, high = min(intensities) / 2, max(intensities) * 2
    for number, dtype in enumerate(sorted({case["dtype"] for case in cases})):
        # The best of the run: the lines are above what each case's floor was made of, or on it.
        ceilings = [case["ceilings"] for case in cases if case["dtype"] == dtype]
        flops, nbytes = (max(one[key] for one in ceilings) for key in ("flops_per_second", "bytes_per_second"))
        xs = sorted({low, min(max(flops / nbytes, low), high), high})
        ys = [min(x * nbytes, flops) for x in xs]
        ax.plot(xs, ys, LINES[number % len(LINES)], color="black", linewidth=1, label=f"measured ceilings, {dtype}")
    ax.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
    ax.legend(frameon=False, fontsize=8)
    plain(ax)
    ax.figure.savefig(file, dpi=150)
    plt.close("all")
