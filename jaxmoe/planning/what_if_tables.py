"""Rows of the tables of `compare_placements` and `compare_devices`, the headings first: for the command and its page."""

from collections.abc import Sequence

from jaxmoe.mesh import write_mesh
from jaxmoe.planning.what_if import DevicesChoice, PlacementChoice

Row = tuple[str, ...]


def placement_rows(choices: Sequence[PlacementChoice]) -> list[Row]:
    """A row for each placement; what needs a trace is left out where there was none."""
    traced, sends = any(choice.skew for choice in choices), any(choice.sent_per_token is not None for choice in choices)
    heads = ["placement", "extra slots", "GB", "replicas GB", "room for", "decode ms", "prefill ms"]
    heads += ["skew", "worst layer"] if traced else []
    rows = [tuple(heads + (["MB a token"] if sends else []))]
    for choice in choices:
        row = [
            choice.placement,
            f"{choice.redundancy}",
            f"{choice.bytes_per_device / 1e9:.1f}",
            f"{choice.replica_bytes / 1e9:.1f}",
            f"{choice.largest_batch:,}" if choice.fits else "no room",
            f"{choice.decode.seconds * 1e3:.2f}",
            f"{choice.prefill.seconds * 1e3:,.1f}",
        ]
        row += [f"{sum(choice.skew) / len(choice.skew):.2f}", f"{max(choice.skew):.2f}"] if choice.skew else []
        row += [f"{choice.sent_per_token / 1e6:.2f}"] if choice.sent_per_token is not None else []
        rows.append(tuple(row))
    return rows


def devices_rows(choices: Sequence[DevicesChoice]) -> list[Row]:
    """A row for each number of devices; costs are left out where there is no price."""
    priced = any(choice.price_per_hour is not None for choice in choices)
    heads = ["devices", "best mesh", "experts over", "GB", "decode ms", "prefill ms", "tokens/s", "a device", "gain"]
    rows = [(*heads, *(["1M out", "1M in"] if priced else []))]
    for choice in choices:
        best = choice.best
        if best is None:
            row = ["no room", *[""] * (len(heads) - 2)]
        else:
            rate = getattr(best, choice.search.rank_by).tokens_per_second
            row = [
                write_mesh(best.mesh),
                "·".join(best.expert_axes),
                f"{best.bytes_per_device / 1e9:.1f}",
                f"{best.decode.seconds * 1e3:.2f}",
                f"{best.prefill.seconds * 1e3:,.1f}",
                f"{rate:,.0f}",
                f"{rate / choice.devices:,.0f}",
                "" if choice.gain is None else f"{choice.gain - 1:+.0%}",
            ]
        costs = [choice.cost_per_million("decode"), choice.cost_per_million("prefill")] if priced else []
        rows.append((f"{choice.devices}", *row, *("" if cost is None else f"{cost:.3f}" for cost in costs)))
    return rows
