"""`plan_page`: a plan as one page of HTML that needs no other file."""

import html
import io
from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from jaxmoe.mesh import write_mesh
from jaxmoe.planning import DevicesChoice, MeshSearch, PlacementChoice, Plan, SweepPoint
from jaxmoe.planning.what_if_tables import devices_rows, placement_rows
from jaxmoe.viz.memory import device_memory
from jaxmoe.viz.skew import skew_by_layer
from jaxmoe.viz.times import step_times

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #009e73; --bad: #d55e00; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p.verdict { font-size: 1.15rem; border-left: .35rem solid var(--good); padding: .4rem .8rem; background: var(--soft); }
p.verdict.bad { border-color: var(--bad); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.first td, tr.total td { font-weight: 600; }
td.none { color: var(--bad); }
figure { margin: 1rem 0; background: #fff; border-radius: .4rem; padding: .5rem; }
figure svg { max-width: 100%; height: auto; display: block; }
footer { margin-top: 3rem; font-size: .85rem; opacity: .75; }
"""


def plan_page(
    plan: Plan,
    *,
    search: MeshSearch | None = None,
    sweep: Sequence[SweepPoint] = (),
    placements: Sequence[PlacementChoice] = (),
    devices: Sequence[DevicesChoice] = (),
) -> str:
    """Write a plan as a page.

    Args:
        plan: plan of one mesh.
        search: ranking of meshes, to be shown too.
        sweep: points of a sweep of that mesh, to be shown too.
        placements: placements on that mesh, to be shown side by side.
        devices: numbers of devices, likewise.

    Returns:
        HTML with its pictures in it, as SVG.
    """
    sizes = write_mesh(plan.mesh)
    body = [
        f"<h1>{html.escape(plan.model_type)} on {html.escape(sizes)}</h1>",
        f"<p>{plan.parameters / 1e9:,.1f} billion parameters, {plan.active_parameters / 1e9:,.2f} billion active per token, "
        f"in {plan.dtype}; a cache for {plan.batch_size} sequences of {plan.max_length:,} tokens.</p>",
        _verdict(plan),
        "<h2>What each device holds</h2>",
        _figure(device_memory(plan.parts, capacity=plan.capacity)),
        _parts(plan),
    ]
    if plan.notes:
        body += ["<ul>", *(f"<li>{html.escape(note)}</li>" for note in plan.notes), "</ul>"]
    if search is not None:
        body += [
            f"<h2>Every mesh of {_devices(search)} devices</h2>",
            *(f"<p>{html.escape(line)}</p>" for line in search.explain()),
        ]
        if search.choices:
            body += [_figure(step_times(search.choices[:12], search.rank_by)), _meshes(search)]
    if sweep:
        body += ["<h2>Sequences and their length</h2>", _grid(sweep)]
    if placements:
        body += ["<h2>Placements side by side</h2>", _table(placement_rows(placements))]
        if placements[0].skew:
            body.append(_figure(skew_by_layer(placements)))
    if devices:
        body += ["<h2>Numbers of devices</h2>", _table(devices_rows(devices))]
    body.append(
        "<footer>Memory is counted from the config and the headers of the checkpoint; activations are not in it. Times "
        "are modeled from bytes, arithmetic and links at their highest rates, and nothing overlaps: use them to "
        "compare.</footer>"
    )
    title = f"{html.escape(plan.model_type)}: plan"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n<body>'
        + "\n".join(body)
        + "</body></html>\n"
    )


def _verdict(plan: Plan) -> str:
    if plan.capacity is None or plan.headroom is None:
        return '<p class="verdict">No kind of device was named, so there is nothing to compare with.</p>'
    most = max(plan.bytes_per_device.values())
    if plan.fits:
        text = (
            f"It fits: the fullest device holds {most / 1e9:.1f} GB, and {plan.headroom / 1e9:.1f} GB of a {plan.device} "
            f"are left. There is room for {plan.largest_batch:,} such sequences, or for {plan.largest_length:,} tokens of "
            "each."
        )
        return f'<p class="verdict">{html.escape(text)}</p>'
    text = (
        f"It does not fit: the fullest device would hold {most / 1e9:.1f} GB, and a {plan.device} has "
        f"{plan.capacity / 1e9:.1f}."
    )
    return f'<p class="verdict bad">{html.escape(text)}</p>'


def _parts(plan: Plan) -> str:
    rows = [("part", "least GB", "most GB")]
    rows += [(name, f"{part.min() / 1e9:.2f}", f"{part.max() / 1e9:.2f}") for name, part in plan.parts.items()]
    total = plan.bytes_per_device.values()
    rows.append(("total", f"{min(total) / 1e9:.2f}", f"{max(total) / 1e9:.2f}"))
    return _table(rows, strong=len(rows) - 1, kind="total")


def _meshes(search: MeshSearch) -> str:
    rows = [("mesh", "GB a device", "decode ms", "tokens/s", "prefill ms", "most time in")]
    for choice in search.choices:
        step = getattr(choice, search.rank_by)
        rows.append(
            (
                str(choice),
                f"{choice.bytes_per_device / 1e9:.1f}",
                f"{choice.decode.seconds * 1e3:.2f}",
                f"{choice.decode.tokens_per_second:,.0f}",
                f"{choice.prefill.seconds * 1e3:.1f}",
                next(iter(step.terms())),
            )
        )
    return _table(rows, strong=1, kind="first")


def _grid(points: Sequence[SweepPoint]) -> str:
    lengths = sorted({point.length for point in points})
    rows = [("sequences", *(f"{length:,} tokens" for length in lengths))]
    for batch_size in sorted({point.batch_size for point in points}):
        own = {point.length: point for point in points if point.batch_size == batch_size}
        rows.append((f"{batch_size:,}", *(_cell(own[length]) for length in lengths)))
    return "<p>GB on the fullest device, and ms of a decode step.</p>" + _table(rows)


def _cell(point: SweepPoint) -> str:
    if not point.fits:
        return f"{point.bytes_per_device / 1e9:.1f} GB: no room"
    return f"{point.bytes_per_device / 1e9:.1f} GB, {point.decode.seconds * 1e3:.1f} ms"


def _table(rows: Sequence[tuple[str, ...]], *, strong: int = 0, kind: str = "") -> str:
    head, *body = rows
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>"]
    for number, row in enumerate(body, 1):
        cells = "".join(
            f'<td class="none">{html.escape(cell)}</td>'
            if cell.endswith("no room")
            else f"<td>{html.escape(cell)}</td>"
            for cell in row
        )
        lines.append(f'<tr class="{kind}">{cells}</tr>' if number == strong else f"<tr>{cells}</tr>")
    return "\n".join([*lines, "</table>"])


def _figure(ax: Axes) -> str:
    figure = ax.get_figure(root=True)
    assert figure is not None
    out = io.StringIO()
    figure.savefig(out, format="svg")
    plt.close(figure)
    svg = out.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _devices(search: MeshSearch) -> int:
    first = (*search.choices, *search.too_large)[0]
    return first.mesh["dp"] * first.mesh["tp"] * first.mesh["ep"]
