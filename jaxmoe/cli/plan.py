"""``jaxmoe plan``: the memory of each device, without devices and without weights."""

import argparse
import json
from typing import TYPE_CHECKING

from jaxmoe.cli import options
from jaxmoe.cli.units import show_bytes, show_count

if TYPE_CHECKING:
    from jaxmoe.planning import Plan

HELP = "tell what each device would hold of a model, from its config.json alone"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe plan``."""
    parser.add_argument(
        "checkpoint",
        metavar="PATH",
        help="a checkpoint directory, or a name in the hub's cache; its config.json is all that is read",
    )
    parser.add_argument(
        "--mesh",
        type=options.mesh_sizes,
        default="dp=1,tp=1,ep=1",
        metavar="dp=1,tp=2,ep=4",
        help="mesh sizes, axes left out being 1 (one device)",
    )
    options.add_placement(parser)
    options.add_expert_axes(parser)
    parser.add_argument("--device", metavar="NAME", help="compare with the memory of a kind of device, such as h100")
    parser.add_argument("--dtype", help="of weights and cache (default: the config's own)")
    options.add_quantized(parser, default="keep")
    options.add_activations(parser)
    options.add_mtp(parser)
    parser.add_argument("--batch-size", type=options.count, default=1, metavar="B", help="sequences to hold (1)")
    parser.add_argument("--max-length", type=options.count, metavar="C", help="tokens of each (4096)")
    parser.add_argument(
        "--adapter",
        action="append",
        type=options.named_adapter,
        default=[],
        metavar="NAME=DIR",
        help="a LoRA adapter to hold beside the weights (repeatable)",
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Print the plan. A model that does not fit is an answer, not an error."""
    from jaxmoe.planning import plan

    report = plan(
        args.checkpoint,
        **args.mesh,
        placement=options.read_placement(args.placement),
        expert_axes=args.expert_axes,
        dtype=args.dtype,
        quantized=args.quantized,
        activations=args.activations,
        mtp=args.mtp,
        batch_size=args.batch_size,
        max_length=args.max_length,
        device=args.device,
        adapters=dict(args.adapter),
    )
    if args.json:
        print(json.dumps(report.to_dict()))
    else:
        _print(report)


def _print(report: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    sizes = ",".join(f"{axis}={size}" for axis, size in report.mesh.items())
    console.print(
        f"{report.model_type}, {show_count(report.parameters)} parameters in {report.dtype} on {sizes}; "
        f"{show_count(report.active_parameters)} active per token; "
        f"cache for {report.batch_size} x {report.max_length} tokens",
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
        console.print(f"{verdict} in the {show_bytes(report.capacity)} of {report.device}, activations not counted")


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
