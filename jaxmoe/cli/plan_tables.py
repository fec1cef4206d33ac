"""Tables and lines of ``jaxmoe plan``, where JSON is not asked for."""

from typing import TYPE_CHECKING, Any

from jaxmoe.cli.units import show_bytes, show_count

if TYPE_CHECKING:
    from jaxmoe.planning import DevicesChoice, MeshSearch, PlacementChoice, Plan, SweepPoint

# Layouts that a table shows; --json has all.
_SHOWN = 10


def print_plan(report: "Plan") -> None:
    """Print what a plan says of each device."""
    from rich.console import Console
    from rich.table import Table

    from jaxmoe.hardware import JAX_TAKES
    from jaxmoe.mesh import write_mesh

    console = Console()
    console.print(
        f"{report.model_type}, {show_count(report.parameters)} parameters in {report.dtype} on {write_mesh(report.mesh)}; "
        f"{show_count(report.active_parameters)} active per token; "
        f"cache for {report.batch_size} x {report.max_length} tokens, prefill of {report.batch_size} x "
        f"{report.prompt_length}",
        highlight=False,
    )
    if report.stored is not None:
        console.print(_describe_stored(report), highlight=False)
    table = Table()
    table.add_column("on a device")
    table.add_column("least", justify="right")
    table.add_column("most", justify="right")
    for name, part in report.parts.items():
        table.add_row(name, show_bytes(part.min()), show_bytes(part.max()))
    total = report.bytes_per_device.values()
    table.add_row("total", show_bytes(min(total)), show_bytes(max(total)), style="bold")
    console.print(table)
    if report.capacity is not None:
        verdict = "fits" if report.fits else "does not fit"
        console.print(f"{verdict} in the {show_bytes(report.capacity)} of {report.device}")
        if report.fits:
            if max(total) > JAX_TAKES * report.capacity:
                console.print(
                    f"it is more than the {show_bytes(JAX_TAKES * report.capacity)} that JAX takes of it by itself: start "
                    "with XLA_CLIENT_MEM_FRACTION=0.95",
                    highlight=False,
                )
            console.print(
                f"{show_bytes(report.headroom or 0)} are left: there is room for {report.largest_batch:,} sequences of "
                f"{report.max_length:,} tokens, or {report.batch_size:,} of {report.largest_length:,}",
                highlight=False,
            )


def _describe_stored(report: "Plan") -> str:
    """A sentence on the files: their bytes, and the formats of quantized parts."""
    from jaxmoe.quant.activations import describe_asked

    assert report.stored is not None
    text = f"{show_bytes(report.stored.nbytes)} of weights in the checkpoint"
    if report.stored.method is None:
        return text
    quantized = {part: [*sizes.keys() - {"plain"}] for part, sizes in report.stored.formats.items()}
    parts = [f"{part} in {' and '.join(sorted(formats))}" for part, formats in quantized.items() if formats]
    text = f"{text}, {', '.join(parts)} ({report.stored.method})"
    packed = {part: [form for form in forms if " scales of " in form] for part, forms in report.held.items()}
    held = [f"{part} as {' and '.join(sorted(forms))}" for part, forms in packed.items() if forms]
    text += f"; held packed: {'; '.join(held)}" if held else f"; they are held decoded, in {report.dtype}"
    return "\n".join([text, *report.notes, *describe_asked(report.stored.activations)])


def print_search(search: "MeshSearch") -> None:
    """Print the best layouts of a search, and why the first is the first."""
    from rich.console import Console
    from rich.table import Table

    from jaxmoe.mesh import write_mesh

    console = Console()
    table = Table(
        title=f"batch size {search.batch_size}; decode with a cache of {search.max_length:,} tokens, prefill of "
        f"{search.prompt_length:,} each; times are modeled"
    )
    for name in ("mesh", "experts\nover"):
        table.add_column(name, no_wrap=True)
    for name in ("GB", "decode", "tokens/s", "prefill", "most in"):
        table.add_column(name, justify="right")
    for choice in search.choices[:_SHOWN]:
        step = getattr(choice, search.rank_by)
        table.add_row(
            write_mesh(choice.mesh),
            ",".join(choice.expert_axes),
            f"{choice.bytes_per_device / 1e9:.1f}",
            f"{choice.decode.seconds * 1e3:.1f} ms",
            f"{choice.decode.tokens_per_second:,.0f}",
            f"{choice.prefill.seconds * 1e3:.0f} ms",
            next(iter(step.terms())),
        )
    if search.choices:
        console.print(table)
    counts = [f"{len(search.choices)} fit"]
    counts += [f"{len(search.too_large)} do not"] if search.too_large else []
    counts += [f"on {len(search.left_out)} the model cannot lie"] if search.left_out else []
    console.print(f"Of the layouts {', '.join(counts)}.", highlight=False)
    for line in search.explain():
        console.print(line, highlight=False)


def print_sweep(points: "list[SweepPoint]") -> None:
    """Print a sweep, a line for each number of sequences."""
    from rich.console import Console
    from rich.table import Table

    lengths = sorted({point.length for point in points})
    table = Table(title="GB on the fullest device, and a modeled decode step")
    table.add_column("sequences", justify="right")
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    for batch_size in sorted({point.batch_size for point in points}):
        own = {point.length: point for point in points if point.batch_size == batch_size}
        cells = [
            f"{own[length].bytes_per_device / 1e9:.1f}"
            + (f" · {own[length].decode.seconds * 1e3:.1f} ms" if own[length].fits else " no room")
            for length in lengths
        ]
        table.add_row(f"{batch_size:,}", *cells)
    Console().print(table)


def print_placements(choices: "list[PlacementChoice]") -> None:
    """Print placements side by side."""
    from jaxmoe.planning.what_if_tables import placement_rows

    _print_rows(placement_rows(choices), "Placements side by side; times are modeled")


def print_devices(choices: "list[DevicesChoice]") -> None:
    """Print the best mesh of each number of devices, and what it costs."""
    from jaxmoe.planning.what_if_tables import devices_rows

    priced = "" if choices[0].price_per_hour is None else ", and the price of a million tokens"
    _print_rows(devices_rows(choices), f"The best of each number of devices by {choices[0].search.rank_by}{priced}")


def _print_rows(rows: "list[tuple[str, ...]]", title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, box=None, padding=(0, 1, 0, 0))
    for name in rows[0]:
        words = name in ("placement", "best mesh", "experts over")
        # Ten columns are narrow: a heading has a word on a line.
        heading = name if name == "best mesh" else name.replace(" ", "\n")
        table.add_column(
            heading, justify="left" if words else "right", no_wrap=not words, overflow="fold", vertical="top"
        )
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def print_compiled(step: dict[str, Any]) -> None:
    """Print how far a compiled step is from the plan, and its collectives."""
    from rich.console import Console

    console = Console()
    console.print(
        f"{step['step']} compiled with {_layers(step)}: {show_bytes(step['argument_bytes'])} of weights, cache and inputs "
        f"({step['arguments_over_plan']:+.2%} against the plan), {show_bytes(step['temp_bytes'])} besides "
        f"({step['all_over_plan']:+.1%} with them): {'fits' if step['fits'] else 'does not fit'}; a device sends "
        f"{show_bytes(step['wire_bytes'])} if every loop runs once",
        highlight=False,
    )
    for line in step["exchanges"]:
        console.print(f"  {line}", highlight=False, markup=False)


def _layers(step: dict[str, Any]) -> str:
    """Say which layers of a step were compiled, and how the others were counted."""
    *fewer, most = step["compiled_layers"]
    if not fewer:
        return f"all {step['layers']} layers"
    return f"{fewer[0]} and with {most} of {step['layers']} layers, each of the others counted as what the second adds"
