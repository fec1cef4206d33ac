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
h1 { font-size: 1.6rem; line-height: 1.25; margin-bottom: 0; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; }
ul { padding-left: 1.2rem; }
p.verdict { font-size: 1.1rem; border-left: .35rem solid var(--good); padding: .4rem .8rem; background: var(--soft); }
p.verdict.bad { border-color: var(--bad); }
/* What is wider than a small screen is moved sideways, and the page is not. */
div.wide, figure { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { vertical-align: bottom; line-height: 1.25; }
td { white-space: nowrap; }
.text { text-align: left; }
tr:hover td { background: var(--soft); }
tr.strong td { font-weight: 600; }
td.none { color: var(--bad); }
summary { cursor: pointer; padding: .4rem .7rem; }
figure svg { max-width: 100%; min-width: 34rem; height: auto; display: block; }
@media (prefers-color-scheme: dark) { figure svg { filter: invert(1) hue-rotate(180deg); } }
footer { margin-top: 3rem; font-size: .85rem; opacity: .75; }
"""
_SKEW = (
    "Skew is the most rows of a device over their mean, by the second half of the trace; the table has the mean of all MoE "
    "layers and the worst of them, and the megabytes of activations that a token sends to other devices."
)
_GAIN = "The fastest mesh of each number for the same sequences, and its gain in tokens/s over the number before."
_PRICES = "The last columns are the price of a million tokens that are generated (out) and that are read (in)."
# Rows of a table that are shown at once; the others are there to be opened.
_SHOWN = 12


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
        body.append(_list(plan.notes))
    if search is not None:
        body += [
            f"<h2>Every mesh of {_devices(search)} devices</h2>",
            _list(search.explain()),
        ]
        if search.choices:
            body += [_figure(step_times(search.choices[:_SHOWN], search.rank_by)), _meshes(search)]
    if sweep:
        body += ["<h2>Sequences and their length</h2>", _grid(sweep)]
    if placements:
        body.append("<h2>Placements side by side</h2>")
        if placements[0].skew:
            body += [f"<p>{_SKEW}</p>", _figure(skew_by_layer(placements))]
        body.append(_table(placement_rows(placements)))
    if devices:
        prices = "" if devices[0].price_per_hour is None else f" {_PRICES}"
        body += ["<h2>Numbers of devices</h2>", f"<p>{_GAIN}{prices}</p>", _table(devices_rows(devices))]
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
            f"It fits: of the {plan.capacity / 1e9:.1f} GB of each {plan.device} the fullest holds {most / 1e9:.1f}, "
            f"and {plan.headroom / 1e9:.1f} are left. There is room for {plan.largest_batch:,} such sequences, or for "
            f"{plan.largest_length:,} tokens of each."
        )
        return f'<p class="verdict">{html.escape(text)}</p>'
    text = (
        f"It does not fit: the fullest device would hold {most / 1e9:.1f} GB, and each {plan.device} has "
        f"{plan.capacity / 1e9:.1f}."
    )
    return f'<p class="verdict bad">{html.escape(text)}</p>'


def _parts(plan: Plan) -> str:
    rows = [("part", "least GB", "most GB")]
    rows += [(name, f"{part.min() / 1e9:.2f}", f"{part.max() / 1e9:.2f}") for name, part in plan.parts.items()]
    total = plan.bytes_per_device.values()
    rows.append(("total", f"{min(total) / 1e9:.2f}", f"{max(total) / 1e9:.2f}"))
    return _table(rows, strong=len(rows) - 1)


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
                f"{choice.prefill.seconds * 1e3:,.1f}",
                next(iter(step.terms())),
            )
        )
    return _table(rows, strong=1)


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


def _table(rows: Sequence[tuple[str, ...]], *, strong: int = 0) -> str:
    """A table, its headings in the first row and one row in bold; columns of words are flush left, others flush right."""
    head, *body = rows
    texts = [not any(cell[:1] in set("0123456789+-") for cell in column if cell) for column in zip(*body, strict=True)]

    def row(cells: Sequence[str], tag: str) -> str:
        line = ""
        for text, cell in zip(texts, cells, strict=True):
            kinds = ["text"] * text + ["none"] * cell.endswith("no room")
            line += f'<{tag} class="{" ".join(kinds)}">' if kinds else f"<{tag}>"
            line += f"{html.escape(cell)}</{tag}>"
        return line

    lines = [
        f'<tr class="strong">{row(cells, "td")}</tr>' if number == strong else f"<tr>{row(cells, 'td')}</tr>"
        for number, cells in enumerate(body, 1)
    ]
    heading = f"<tr>{row(head, 'th')}</tr>"
    tables = [lines[:_SHOWN], lines[_SHOWN:]]
    first, rest = ("\n".join(["<table>", heading, *part, "</table>"]) for part in tables)
    more = f"<details><summary>{len(tables[1])} more</summary>{rest}</details>" if tables[1] else ""
    return f'<div class="wide">{first}{more}</div>'


def _list(lines: Sequence[str]) -> str:
    return "\n".join(["<ul>", *(f"<li>{html.escape(line)}</li>" for line in lines), "</ul>"])


def _figure(ax: Axes) -> str:
    figure = ax.get_figure(root=True)
    assert figure is not None
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True)
    plt.close(figure)
    svg = out.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}</figure>"


def _devices(search: MeshSearch) -> int:
    first = (*search.choices, *search.too_large)[0]
    return first.mesh["dp"] * first.mesh["tp"] * first.mesh["ep"]
