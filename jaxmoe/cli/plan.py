"""``jaxmoe plan``: the memory of each device, without devices and without weights."""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import options, plan_tables
from jaxmoe.cli.plan_options import add_options, check_options

if TYPE_CHECKING:
    from jaxmoe.placement import RoutingTrace
    from jaxmoe.planning import DevicesChoice, MeshSearch, PlacementChoice, Plan, SweepPoint

HELP = "tell what each device would hold of a model, and which mesh would be best, from its config.json alone"
__all__ = ["HELP", "add_options", "run"]


def run(args: argparse.Namespace) -> None:
    """Print the plan. A model that does not fit is an answer, not an error."""
    from jaxmoe.planning import plan

    check_options(args)
    options.check_folders(args, "html")
    trace = None if args.trace is None else _read_trace(args)
    devices = [] if args.devices is None else _compare_devices(args, trace)
    # The plan is of the first number of devices on which the model fits.
    search = next((each.search for each in devices if each.best), devices[-1].search) if devices else None
    best = None if search is None else next(iter((*search.choices, *search.too_large)), None)
    if search is not None and best is None:
        raise ValueError(" ".join(search.explain()))
    mesh = args.mesh or {} if best is None else best.mesh
    axes = args.expert_axes or ("ep",) if best is None else best.expert_axes
    report = plan(
        args.checkpoint,
        **mesh,
        placement=options.read_placement(args.placement or "linear"),
        expert_axes=axes,
        dtype=args.dtype,
        quantized=args.quantized,
        activations=args.activations,
        mtp=args.mtp,
        batch_size=args.batch_size,
        max_length=args.max_length,
        prompt_length=args.prompt_length,
        device=args.device,
        adapters=dict(args.adapter),
        trace=trace,
    )
    points = [] if args.sweep is None else _sweep(args, report, axes, trace)
    numbers = devices if len(devices) > 1 or args.price_per_hour is not None else []
    placements = _compare_placements(args, report, axes, trace)
    compiled = _compile(args, report, axes) if args.compile else []
    if args.html is not None:
        _write_page(args.html, report, search, points, placements, numbers)
    if args.json:
        more: dict[str, Any] = {} if search is None else {"search": search.to_dict()}
        more |= {"devices": [each.to_dict() for each in numbers]} if numbers else {}
        more |= {"sweep": [point.to_dict() for point in points]} if points else {}
        more |= {"placements": [choice.to_dict() for choice in placements]} if placements else {}
        more |= {"compiled": compiled} if compiled else {}
        print(json.dumps(report.to_dict() | more))
        return
    if numbers:
        plan_tables.print_devices(numbers)
    if search is not None:
        plan_tables.print_search(search)
    plan_tables.print_plan(report)
    if points:
        plan_tables.print_sweep(points)
    if placements:
        plan_tables.print_placements(placements)
    if args.measured and search is None:
        _print_measured(args)
    for step in compiled:
        plan_tables.print_compiled(step)


def _read_trace(args: argparse.Namespace) -> "RoutingTrace":
    from jaxmoe.cli import model_sizes
    from jaxmoe.config import directory_of, find_checkpoint

    sizes = model_sizes.of_config(str(directory_of(find_checkpoint(args.checkpoint))))
    return options.read_trace([args.trace], num_experts=sizes.num_experts)


def _compare_devices(args: argparse.Namespace, trace: "RoutingTrace | None") -> "list[DevicesChoice]":
    from jaxmoe.planning import compare_devices

    return compare_devices(
        args.checkpoint,
        args.devices,
        device=args.device,
        price_per_hour=args.price_per_hour,
        batch_size=args.batch_size,
        max_length=args.max_length,
        prompt_length=args.prompt_length,
        devices_per_node=args.devices_per_node,
        placement=args.placement or "linear",
        dtype=args.dtype,
        quantized=args.quantized,
        mtp=args.mtp,
        rank_by=args.rank_by,
        trace=trace,
        measured=args.measured,
    )


def _compare_placements(
    args: argparse.Namespace, report: "Plan", expert_axes: tuple[str, ...], trace: "RoutingTrace | None"
) -> "list[PlacementChoice]":
    """Compare what is named, or judge the plan's own placement by the trace; nothing where neither is asked for."""
    from jaxmoe.planning import compare_placements

    if args.compare_placements is None and args.redundancy is None and trace is None:
        return []
    own = args.placement or ("eplb" if args.redundancy and trace is not None else "linear")
    return compare_placements(
        args.checkpoint,
        {name: options.read_placement(name) for name in args.compare_placements or [own]},
        **report.mesh,
        device=args.device,
        redundancy=args.redundancy or [0],
        trace=trace,
        expert_axes=expert_axes,
        batch_size=report.batch_size,
        max_length=report.max_length,
        prompt_length=args.prompt_length,
        devices_per_node=args.devices_per_node,
        dtype=args.dtype,
        quantized=args.quantized,
        mtp=args.mtp,
        measured=args.measured,
    )


def _sweep(
    args: argparse.Namespace, report: "Plan", expert_axes: tuple[str, ...], trace: "RoutingTrace | None"
) -> "list[SweepPoint]":
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
        prompt_length=args.prompt_length,
        placement=options.read_placement(args.placement or "linear"),
        expert_axes=expert_axes,
        devices_per_node=args.devices_per_node,
        dtype=args.dtype,
        quantized=args.quantized,
        mtp=args.mtp,
        trace=trace,
        measured=args.measured,
    )


def _compile(args: argparse.Namespace, report: "Plan", expert_axes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Compile both steps, and compare what they take with the plan."""
    import jax

    from jaxmoe.hardware import get_gpu
    from jaxmoe.mesh import make_mesh
    from jaxmoe.planning import compile_few_layers, describe_exchanges, gpu_topology

    jax.config.update("jax_platforms", "cpu")  # the compiler needs no driver, and jax would look for one
    count = math.prod(report.mesh.values())
    hosts = -(-count // args.devices_per_node)
    mesh = make_mesh(**report.mesh, devices=list(gpu_topology(args.device, count, hosts=hosts)))
    steps = compile_few_layers(
        args.checkpoint,
        mesh,
        placement=options.read_placement(args.placement or "linear"),
        expert_axes=expert_axes,
        dtype=report.dtype,
        activations=args.activations,
        batch_size=report.batch_size,
        prompt_length=report.prompt_length,
        max_length=report.max_length,
        every_layer=args.every_layer,
    )
    room = get_gpu(args.device).memory
    return [
        {
            "step": name,
            "argument_bytes": step.argument_bytes,
            "temp_bytes": step.temp_bytes,
            "layers": step.layers,
            "compiled_layers": step.compiled,
            "planned_bytes": report.held_bytes + report.step_bytes[name],
            "arguments_over_plan": step.argument_bytes / report.held_bytes - 1,
            "all_over_plan": (step.argument_bytes + step.temp_bytes) / (report.held_bytes + report.step_bytes[name])
            - 1,
            "fits": step.argument_bytes + step.temp_bytes <= room,
            "wire_bytes": step.wire_bytes,
            "exchanges": list(describe_exchanges(step.exchanges)),
        }
        for name, step in steps.items()
    ]


def _write_page(
    file: str,
    report: "Plan",
    search: "MeshSearch | None",
    points: "list[SweepPoint]",
    placements: "list[PlacementChoice]",
    devices: "list[DevicesChoice]",
) -> None:
    from jaxmoe.viz import plan_page

    page = plan_page(report, search=search, sweep=points, placements=placements, devices=devices)
    Path(file).write_text(page, encoding="utf-8")


def _print_measured(args: argparse.Namespace) -> None:
    from rich.console import Console

    from jaxmoe.hardware import get_gpu
    from jaxmoe.planning import read_measured

    gpu = get_gpu(args.device)
    for line in read_measured(args.measured, gpu).describe(gpu):
        Console().print(line, highlight=False, markup=False)
