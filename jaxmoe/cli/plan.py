"""``jaxmoe plan``: the memory of each device, without devices and without weights."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import options
from jaxmoe.cli.units import show_bytes, show_count

if TYPE_CHECKING:
    from jaxmoe.planning import MeshSearch, Plan, SweepPoint

# Layouts that a table shows; --json has all.
_SHOWN = 10

HELP = "tell what each device would hold of a model, and which mesh would be best, from its config.json alone"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe plan``."""
    parser.add_argument(
        "checkpoint",
        metavar="PATH",
        help="a checkpoint directory, or a name in the hub's cache; its config.json is all that is read",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--mesh",
        type=options.mesh_sizes,
        metavar="dp=1,tp=2,ep=4",
        help="mesh sizes, axes left out being 1 (default: one device)",
    )
    where.add_argument(
        "--devices", type=options.count, metavar="N", help="try every mesh of N devices, and rank them by modeled time"
    )
    options.add_placement(parser)
    parser.add_argument(
        "--expert-axes",
        type=options.axes,
        metavar="ep,tp",
        help="mesh axes that share the experts (ep; with --devices every way is tried)",
    )
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
    parser.add_argument(
        "--rank-by", choices=("decode", "prefill"), default="decode", help="step whose time ranks --devices (decode)"
    )
    parser.add_argument(
        "--prompt-length", type=options.count, metavar="S", help="tokens of each in the prefill (half of --max-length)"
    )
    parser.add_argument(
        "--devices-per-node", type=options.count, default=8, metavar="N", help="devices with the faster links (8)"
    )
    parser.add_argument(
        "--sweep",
        type=options.names,
        metavar="batch,context",
        help="memory and decode time for batches and contexts of powers of two, with --device",
    )
    parser.add_argument(
        "--measured",
        action="append",
        default=[],
        metavar="FILE",
        help="take rates and times that were measured in place of modeled ones, such as a gpu_session's (repeatable)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also compile prefill and decode for these GPUs, which need not be there, and compare (needs the extra aot)",
    )
    parser.add_argument("--html", metavar="FILE", help="write the answer as one page with pictures (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Print the plan. A model that does not fit is an answer, not an error."""
    from jaxmoe.planning import plan

    _check(args)
    search = None if args.devices is None else _search(args)
    best = None if search is None else next(iter((*search.choices, *search.too_large)), None)
    if search is not None and best is None:
        raise ValueError(" ".join(search.explain()))
    mesh = args.mesh or {} if best is None else best.mesh
    axes = args.expert_axes or ("ep",) if best is None else best.expert_axes
    placement = options.read_placement(args.placement)
    report = plan(
        args.checkpoint,
        **mesh,
        placement=placement,
        expert_axes=axes,
        dtype=args.dtype,
        quantized=args.quantized,
        activations=args.activations,
        mtp=args.mtp,
        batch_size=args.batch_size,
        max_length=args.max_length,
        device=args.device,
        adapters=dict(args.adapter),
    )
    points = [] if args.sweep is None else _sweep(args, report, axes)
    compiled = _compile(args, report, axes) if args.compile else []
    if args.html is not None:
        _write_page(args.html, report, search, points)
    if args.json:
        more: dict[str, Any] = {} if search is None else {"search": search.to_dict()}
        more |= {"sweep": [point.to_dict() for point in points]} if points else {}
        more |= {"compiled": compiled} if compiled else {}
        print(json.dumps(report.to_dict() | more))
        return
    if search is not None:
        _print_search(search)
    _print(report)
    if points:
        _print_sweep(points)
    if args.measured and search is None:
        _print_measured(args)
    for step in compiled:
        _print_compiled(step)


def _check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.device is None and (args.devices is not None or args.sweep is not None or args.compile):
        raise ValueError(
            "--devices, --sweep and --compile are for a kind of device: name it with --device, such as h100"
        )
    if args.measured and args.devices is None and args.sweep is None:
        raise ValueError("--measured is for modeled times: give --devices or --sweep with it")
    if args.compile and args.adapter:
        raise ValueError("--compile compiles a model's own weights; leave --adapter out")
    if args.devices is None:
        return
    if args.expert_axes is not None:
        raise ValueError("--devices tries every way of sharing the experts; leave --expert-axes out, or give a --mesh")
    if args.placement.endswith(".json"):
        raise ValueError(
            "a file of placements is for one number of devices that share the experts; give a --mesh with it"
        )
    if args.adapter or args.activations:
        raise ValueError("--devices ranks a model's own weights; give a --mesh to plan --adapter or --activations")


def _search(args: argparse.Namespace) -> "MeshSearch":
    from jaxmoe.planning import search_meshes

    return search_meshes(
        args.checkpoint,
        args.devices,
        device=args.device,
        batch_size=args.batch_size,
        max_length=args.max_length,
        prompt_length=args.prompt_length,
        devices_per_node=args.devices_per_node,
        placement=args.placement,
        dtype=args.dtype,
        quantized=args.quantized,
        mtp=args.mtp,
        rank_by=args.rank_by,
        measured=args.measured,
    )


def _sweep(args: argparse.Namespace, report: "Plan", expert_axes: tuple[str, ...]) -> "list[SweepPoint]":
    from jaxmoe.planning import sweep

    if unknown := set(args.sweep) - {"batch", "context"}:
        raise ValueError(f"--sweep goes over batch, context or both; got {', '.join(sorted(unknown))}")
    batches, lengths = [report.batch_size], [report.max_length]
    if "batch" in args.sweep:
        batches = [2**power for power in range(0, 11, 2)]
    if "context" in args.sweep:
        lengths = [1024 * 4**power for power in range(5)]
        lengths = [length for length in lengths if report.positions is None or length <= report.positions] or [
            report.max_length
        ]
    return sweep(
        args.checkpoint,
        **report.mesh,
        device=args.device,
        batch_sizes=batches,
        lengths=lengths,
        placement=options.read_placement(args.placement),
        expert_axes=expert_axes,
        devices_per_node=args.devices_per_node,
        dtype=args.dtype,
        quantized=args.quantized,
        mtp=args.mtp,
        measured=args.measured,
    )


def _compile(args: argparse.Namespace, report: "Plan", expert_axes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Compile both steps, and compare what they take with the plan."""
    import jax

    from jaxmoe.hardware import get_gpu
    from jaxmoe.mesh import make_mesh
    from jaxmoe.planning import compile_steps, describe_exchanges, gpu_topology

    jax.config.update("jax_platforms", "cpu")  # the compiler needs no driver, and jax would look for one
    count = math.prod(report.mesh.values())
    hosts = -(-count // args.devices_per_node)
    mesh = make_mesh(**report.mesh, devices=list(gpu_topology(args.device, count, hosts=hosts)))
    steps = compile_steps(
        args.checkpoint,
        mesh,
        placement=options.read_placement(args.placement),
        expert_axes=expert_axes,
        dtype=report.dtype,
        activations=args.activations,
        batch_size=report.batch_size,
        prompt_length=args.prompt_length or max(1, report.max_length // 2),
        max_length=report.max_length,
    )
    planned, room = max(report.bytes_per_device.values()), get_gpu(args.device).memory
    return [
        {
            "step": name,
            "argument_bytes": step.argument_bytes,
            "temp_bytes": step.temp_bytes,
            "planned_bytes": planned,
            "arguments_over_plan": step.argument_bytes / planned - 1,
            "all_over_plan": (step.argument_bytes + step.temp_bytes) / planned - 1,
            "fits": step.argument_bytes + step.temp_bytes <= room,
            "wire_bytes": sum(each.wire_bytes for each in step.exchanges),
            "exchanges": list(describe_exchanges(step.exchanges)),
        }
        for name, step in steps.items()
    ]


def _print_compiled(step: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.print(
        f"{step['step']} compiled: {show_bytes(step['argument_bytes'])} of weights, cache and inputs "
        f"({step['arguments_over_plan']:+.2%} of the plan), {show_bytes(step['temp_bytes'])} besides "
        f"({step['all_over_plan']:+.1%} with them): {'fits' if step['fits'] else 'does not fit'}; a device sends "
        f"{show_bytes(step['wire_bytes'])} if every loop runs once",
        highlight=False,
    )
    for line in step["exchanges"]:
        console.print(f"  {line}", highlight=False, markup=False)


def _write_page(file: str, report: "Plan", search: "MeshSearch | None", points: "list[SweepPoint]") -> None:
    from jaxmoe.viz import plan_page

    Path(file).write_text(plan_page(report, search=search, sweep=points), encoding="utf-8")


def _print_search(search: "MeshSearch") -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxmoe.mesh import write_mesh

    console = Console()
    table = Table(
        title=f"{search.batch_size} sequences; decode with a cache of {search.max_length:,} tokens, prefill of "
        f"{search.prompt_length:,} each; times are modeled"
    )
    for name in ("mesh", "experts over"):
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


def _print_measured(args: argparse.Namespace) -> None:
    from rich.console import Console

    from jaxmoe.hardware import get_gpu
    from jaxmoe.planning import read_measured

    gpu = get_gpu(args.device)
    for line in read_measured(args.measured, gpu).describe(gpu):
        Console().print(line, highlight=False, markup=False)


def _print_sweep(points: "list[SweepPoint]") -> None:
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


def _print(report: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    from jaxmoe.mesh import write_mesh

    console = Console()
    console.print(
        f"{report.model_type}, {show_count(report.parameters)} parameters in {report.dtype} on {write_mesh(report.mesh)}; "
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
        if report.fits:
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
