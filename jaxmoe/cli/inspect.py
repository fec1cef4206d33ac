"""``jaxmoe inspect``: a checkpoint at a glance, or its experts in vLLM's terms, without reading a weight."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxmoe.cli import options
from jaxmoe.cli.units import show_bytes, show_count

if TYPE_CHECKING:
    from jaxmoe.checkpoint.inspection import CheckpointSummary
    from jaxmoe.interop import Assignment, ExpertRow

HELP = "tell what is in a checkpoint, without reading a weight"

_SHOWN = 8
_QUANTIZED = ("routed experts", "shared experts", "dense MLP", "attention", "embedding", "head")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe inspect``."""
    parser.add_argument(
        "checkpoint", metavar="PATH", help="a checkpoint directory, one file of weights, or a name in the hub's cache"
    )
    options.add_mtp(parser)
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.add_argument(
        "--digests",
        action="store_true",
        help="instead, read all of a checkpoint of Orbax arrays and compare it with the digests it was written with",
    )
    parser.add_argument(
        "--mapping",
        action="store_true",
        help="instead, the parameter and slot of vLLM that every tensor of a routed expert fills",
    )
    parser.add_argument(
        "--redundant-experts",
        type=options.count,
        default=0,
        metavar="N",
        help="physical experts beyond those of the checkpoint, for --mapping (0)",
    )


def run(args: argparse.Namespace) -> None:
    """Print the summary, or the mapping. A family that is not known is no error: what can be told is told."""
    if args.redundant_experts and not args.mapping:
        args.usage_error("--redundant-experts goes with --mapping")
    if args.mapping and args.digests:
        args.usage_error("--mapping and --digests are two questions; ask one at a time")
    if args.digests:
        _run_digests(args)
        return
    if args.mapping:
        _run_mapping(args)
        return
    from jaxmoe.checkpoint.inspection import summarize

    summary = summarize(args.checkpoint, mtp=args.mtp)
    if args.json:
        print(json.dumps(summary.to_dict()))
    else:
        _print(summary)


def _print(summary: "CheckpointSummary") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    facts = Table(box=None, show_header=False, pad_edge=False)
    for name, value in _facts(summary):
        facts.add_row(name, Text(value))
    console.print(facts)

    table = Table(title="What the bytes are", title_justify="left")
    table.add_column("group")
    for column in ("tensors", "parameters", "bytes", "share"):
        table.add_column(column, justify="right")
    for group, sizes in summary.groups.items():
        size = sizes["bytes"] or 0
        share = f"{size / summary.bytes:.1%}" if summary.bytes else ""
        table.add_row(group, f"{sizes['tensors']:,}", show_count(sizes["parameters"]), show_bytes(size), share)
    console.print(table)
    for problem in _first(summary.problems, "problems"):
        console.print(Text(f"not loadable: {problem}"))


def _run_digests(args: argparse.Namespace) -> None:
    from jaxmoe.checkpoint import CheckpointError
    from jaxmoe.checkpoint.inspection import check_digests

    found = check_digests(args.checkpoint)
    if found.different:
        raise CheckpointError(
            f"{args.checkpoint}: {len(found.different)} of {found.chunks + found.files} files are not what was written: "
            f"{', '.join(_first(found.different, 'files'))}; copy or convert the checkpoint again"
        )
    if args.json:
        print(json.dumps({"path": args.checkpoint, **found._asdict()}))
    else:
        print(
            f"{args.checkpoint}: {found.chunks:,} chunks of arrays and {found.files:,} other files are what was written"
        )


def _run_mapping(args: argparse.Namespace) -> None:
    from jaxmoe.checkpoint import open_checkpoint
    from jaxmoe.checkpoint.inspection import group_of
    from jaxmoe.interop import map_names

    tensors = open_checkpoint(args.checkpoint).tensors
    mapped = map_names(tensors, args.redundant_experts)
    mapping = {name: mapped.get(name, []) for name in tensors if name in mapped or group_of(name) == "routed experts"}
    if not mapping:
        raise ValueError(f"{args.checkpoint} has no tensor of a routed expert: there is nothing to map")
    if args.json:
        listed = [
            {
                "tensor": name,
                "dtype": tensors[name].dtype_name,
                "shape": tensors[name].shape,
                "fills": [{"param": param, "expert": _expert(row), "shard": row.shard_id} for param, row in places],
            }
            for name, places in mapping.items()
        ]
        print(json.dumps({"path": args.checkpoint, "redundant_experts": args.redundant_experts, "mapping": listed}))
    else:
        _print_mapping(mapping)


def _print_mapping(mapping: Mapping[str, "Sequence[Assignment]"]) -> None:
    """Print a line for each tensor and each place that it fills."""
    lines = [("tensor", "parameter", "expert", "shard")]
    for name, places in mapping.items():
        if not places:
            lines.append((name, "vLLM's mapping has no row for it", "", ""))
        for param, row in places:
            expert = _expert(row)
            lines.append((name, param, "all" if expert is None else f"{expert}", row.shard_id))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _expert(row: "ExpertRow") -> int | None:
    """The physical expert; None for all of them, where a row's number is that of a chunk, which the shard says too."""
    return None if row.is_fused else row.expert_id


def _facts(summary: "CheckpointSummary") -> Iterable[tuple[str, str]]:
    family = summary.model_type or "not given"
    yield "checkpoint", summary.path
    yield "family", family if summary.known else f"{family} (family unknown)"
    if summary.moe_layers is None:
        yield "layers", f"{show_count(summary.layers)}; it is not known how many have routed experts"
    else:
        yield "layers", f"{show_count(summary.layers)}, {show_count(summary.moe_layers)} of them with routed experts"
    if summary.experts is None and summary.experts_per_token is None:
        yield "experts", "not known"
    else:
        yield (
            "experts",
            f"{show_count(summary.experts)} a layer, {show_count(summary.experts_per_token)} for each token",
        )
    for layout, layers in summary.layouts.items():
        yield "expert layout", f"{layout} in layers {_ranges(layers)}"
    if summary.weights:
        yield "dtypes", ", ".join(f"{name} {show_bytes(size)}" for name, size in summary.dtypes.items())
    yield "quantization", _quantization(summary)
    if summary.quantization is not None and summary.formats:
        parts = {group: [*summary.formats[group]] for group in _QUANTIZED if group in summary.formats}
        yield "formats", "; ".join(f"{group}: {' and '.join(formats)}" for group, formats in parts.items())
    for sentence in summary.held:
        yield "held", sentence
    yield "parameters", f"{show_count(summary.parameters)}, {show_count(summary.active_parameters)} active per token"
    yield "bytes", _bytes(summary)
    yield "loads", "no" if summary.problems else "yes"
    for rule, count in summary.renamed.items():
        yield "renamed", f"{count:,} tensors ({rule})"
    for rule, names in summary.ignored.items():
        yield "ignored", f"{len(names):,} tensors ({rule})"
    if summary.uncovered:
        yield "uncovered", "; ".join(_first(summary.uncovered, "tensors"))


def _bytes(summary: "CheckpointSummary") -> str:
    files = f"{summary.files} file{'' if summary.files == 1 else 's'}"
    if summary.weights:
        return f"{show_bytes(summary.bytes)} in {files}"
    size = show_bytes(summary.bytes) if summary.bytes else "unknown"
    told = f"its index names {files}" if summary.files else "config.json alone is read"
    return f"{size}; there are no weights here, {told}"


def _quantization(summary: "CheckpointSummary") -> str:
    if summary.quantization is None:
        return "none"
    settings = {key: value for key, value in summary.quantization.items() if value is not None}
    method, file = settings.pop("method"), settings.pop("from")
    settings.pop("quant_method", None)
    listed = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"{method}, says {file}{': ' if listed else ''}{listed}"


def _first(items: Sequence[str], what: str) -> list[str]:
    """Take the first few of `items`, and say how many are left."""
    more = [f"and {len(items) - _SHOWN:,} more {what}"] if len(items) > _SHOWN else []
    return [*items[:_SHOWN], *more]


def _ranges(numbers: Sequence[int]) -> str:
    """Show ascending integers as ranges.

    Example:
        >>> _ranges([0, 1, 2, 5])
        '0-2, 5'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
