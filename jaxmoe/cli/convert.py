"""``jaxmoe convert``: a checkpoint in, the same weights out in the form that is asked for."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import options
from jaxmoe.cli.units import show_bytes

if TYPE_CHECKING:
    from jaxmoe.checkpoint import SaveReport

HELP = "write a checkpoint in another form"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe convert``."""
    parser.add_argument("source", metavar="SRC", help="a checkpoint directory, of safetensors or .bin files")
    parser.add_argument("directory", metavar="DST", help="the checkpoint directory to make")
    parser.add_argument(
        "--to",
        default="safetensors",
        choices=("safetensors", "orbax"),
        help="what to write: files of tensors that transformers loads too, or Orbax arrays in logical order, which load on "
        "any mesh and placement (safetensors)",
    )
    parser.add_argument(
        "--form",
        choices=("per_expert", "fused"),
        help="one tensor for each expert, or one for all experts of a layer (per_expert)",
    )
    parser.add_argument("--dtype", metavar="NAME", help="of the weights, as bfloat16 (default: as they are)")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="bytes of one file (5GB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint directory that is there")
    parser.add_argument(
        "--quantize",
        metavar="NAME",
        help="format of the linear layers: fp8_block, int8, int4_group, int4_group_128 or mxfp4 (default: plain)",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="MODULE",
        help="a module that --quantize leaves plain, or re: and an expression for some; may be given again",
    )
    options.add_mtp(parser)
    parser.add_argument("--json", action="store_true", help="what was written as one JSON object")
    parser.add_argument("--no-progress", action="store_true", help="draw no progress bar")

    options.add_mesh_options(parser)
    group = parser.add_argument_group(
        "by way of a model",
        "With one of these, or a mesh, the model is loaded and saved. Without, no device is used. With --to orbax, "
        '--placement FILE.json is kept for jaxmoe.load(placement="checkpoint"), and the others do not go.',
    )
    options.add_placement(group, default=None)
    options.add_adapter(group)


def run(args: argparse.Namespace) -> None:
    """Convert and say what was written."""
    import jaxmoe

    progress = sys.stderr.isatty() and not args.no_progress
    if args.to == "orbax":
        _to_orbax(args, progress)
        return
    if args.mtp:
        args.usage_error("--mtp goes with --to orbax; files of tensors have those layers as the original has them")
    form: Any = args.form or "per_expert"
    max_shard_size = args.max_shard_size or "5GB"
    if any((args.mesh, args.simulate, args.placement, args.adapter)):
        model = jaxmoe.load(
            args.source,
            mesh=options.make_mesh(args),
            placement=options.read_placement(args.placement or "linear"),
            dtype=args.dtype,
            adapter=args.adapter,
            progress=progress,
        )
        report = jaxmoe.save(
            model,
            args.directory,
            form=form,
            max_shard_size=max_shard_size,
            overwrite=args.overwrite,
            progress=progress,
            quantize=args.quantize,
            ignore=args.ignore,
        )
    else:
        report = jaxmoe.convert(
            args.source,
            args.directory,
            form=form,
            dtype=args.dtype,
            max_shard_size=max_shard_size,
            overwrite=args.overwrite,
            progress=progress,
            quantize=args.quantize,
            ignore=args.ignore,
        )
    if args.json:
        print(json.dumps(report.to_dict()))
        return
    print("\n".join([_sentence(report), *report.notes]))
    if report.losses:
        _print_losses(report)


def _to_orbax(args: argparse.Namespace, progress: bool) -> None:
    import jaxmoe

    others = {
        "--form": args.form,
        "--max-shard-size": args.max_shard_size,
        "--quantize": args.quantize,
        "--ignore": args.ignore,
        "--mesh": args.mesh,
        "--simulate": args.simulate,
        "--adapter": args.adapter,
    }
    for name, value in others.items():
        if value:
            args.usage_error(
                f"{name} goes with --to safetensors; --to orbax stores weights as they are, for every mesh: convert to "
                "safetensors with it first, and that to orbax"
            )
    if args.placement and not args.placement.endswith(".json"):
        args.usage_error(
            f"--to orbax keeps a placement of a file, which jaxmoe place writes; got {args.placement!r}. The arrays are the "
            "same with any: name a strategy where the checkpoint is loaded"
        )
    report = jaxmoe.convert_to_orbax(
        args.source,
        args.directory,
        dtype=args.dtype,
        placement=options.read_placement_file(args.placement) if args.placement else None,
        mtp=args.mtp,
        overwrite=args.overwrite,
        progress=progress,
    )
    if args.json:
        print(json.dumps(report.to_dict()))
        return
    text = f"{report.path}: {report.arrays} arrays, {show_bytes(report.bytes_written)}, {report.seconds:.1f} s"
    text += f"; {show_bytes(report.bytes_kept)} of them were there" if report.bytes_kept else ""
    text += f"; left out: {', '.join(report.left_out)}" if report.left_out else ""
    packed = [f"{count} parameters packed: {form}" for form, count in report.packed.items()]
    ignored = [f"{len(names):,} tensors ignored: {rule}" for rule, names in report.ignored.items()]
    print("\n".join([text, *packed, *ignored, *report.notes]))


def _sentence(report: "SaveReport") -> str:
    count, files = len(report.files), "file" if len(report.files) == 1 else "files"
    text = (
        f"{report.path}: {report.tensors} tensors ({report.form}), {show_bytes(report.bytes_written)} "
        f"in {count} {files}, {report.seconds:.1f} s"
    )
    text += f"; {report.carried} of them copied as they were" if report.carried else ""
    return f"{text}; left out: {', '.join(report.left_out)}" if report.left_out else text


def _print_losses(report: "SaveReport") -> None:
    """Print one row a layer, with two columns for each kind of weights."""
    from rich.console import Console
    from rich.table import Table

    losses = {(loss.layer, loss.kind): loss for loss in report.losses}
    kinds = list(dict.fromkeys(kind for _, kind in losses))
    table = Table(title=f"Errors of {report.quantized}: RMS and largest, relative", title_justify="left")
    table.add_column("layer", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
        table.add_column("largest", justify="right")
    for layer in dict.fromkeys(layer for layer, _ in losses):
        cells = []
        for kind in kinds:
            loss = losses.get((layer, kind))
            cells += ["", ""] if loss is None else [f"{loss.rms:.4f}", f"{loss.max:.4f}"]
        table.add_row(str(layer), *cells)
    Console().print(table)
