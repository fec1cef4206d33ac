"""``jaxmoe place``: a routing trace in, strategies side by side, the best placement out."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoe.cli import model_sizes, options
from jaxmoe.cli.model_sizes import ModelSizes

if TYPE_CHECKING:
    from jaxmoe.placement import ExpertPlacement, RoutingTrace
    from jaxmoe.placement.compare import Comparison
    from jaxmoe.placement.cost import CostModel

HELP = "compare expert placements on a routing trace and write the best"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe place``."""
    parser.add_argument(
        "trace",
        nargs="*",
        help="routing trace: .npz (jaxmoe, vLLM), .npy (vLLM), .jsonl (Megatron-LM) or .pt (SGLang); several "
        "files where each rank wrote one",
    )
    parser.add_argument("--synthetic", action="store_true", help="make a trace up, of the sizes in --config")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --synthetic and of random choices (0)")
    parser.add_argument(
        "--window", type=options.count, default=1024, metavar="N", help="tokens a step, for vLLM (1024)"
    )

    model_sizes.add_options(parser)

    group = parser.add_argument_group("devices")
    group.add_argument("--ep", type=options.count, required=True, metavar="N", help="devices that share the experts")
    group.add_argument("--num-nodes", type=options.count, default=1, metavar="N", help="nodes they are on (1)")
    group.add_argument(
        "--num-slots", type=options.count, metavar="P", help="slots to fill, replicas included (one an expert)"
    )
    group.add_argument(
        "--device-slots", type=options.integers, metavar="9,9,4", help="room of each device, for weighted"
    )
    group.add_argument("--device-speeds", type=options.numbers, metavar="1,1,0.5", help="relative speed of each device")

    group = parser.add_argument_group("comparison")
    group.add_argument("--strategies", type=options.names, metavar="A,B", help="strategies to compare (default: all)")
    group.add_argument("--include", action="append", metavar="FILE.json", help="judge this placement too (repeatable)")
    group.add_argument("--before", metavar="FILE.json", help="placement in use now, for the bytes to migrate")
    group.add_argument(
        "--replica-choice", default="modulo", metavar="NAME", help="which replica a token takes (modulo)"
    )
    group.add_argument(
        "--deduplicate", default="device", choices=("none", "device", "node"), help="a token is sent once per (device)"
    )
    group.add_argument("--bound", action="store_true", help="add the bound on replica choice (needs SciPy)")
    group.add_argument("--by", default="step_seconds", metavar="METRIC", help="what best means (step_seconds)")

    group = parser.add_argument_group("the best placement")
    group.add_argument("-o", "--output", metavar="FILE.json", help="write it, for --placement")
    group.add_argument(
        "--expert-location", metavar="FILE.json", help="write it for SGLang's --init-expert-location; needs --config"
    )
    group.add_argument(
        "--expert-map",
        type=int,
        metavar="RANK",
        help="print the local slot of every expert on one rank, as vLLM has it",
    )
    parser.add_argument("--json", action="store_true", help="the comparison as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Compare, print, and write the best placement.

    Raises:
        ValueError: the trace, a placement or a size does not fit.
    """
    from jaxmoe.placement import placements_to_json
    from jaxmoe.placement.compare import compare

    if bool(args.trace) == args.synthetic:
        args.usage_error("give the files of a routing trace, or --synthetic")
    if args.expert_map is not None and not 0 <= args.expert_map < args.ep:
        args.usage_error(f"--expert-map is one of the ranks 0 to {args.ep - 1}; got {args.expert_map}")
    if args.expert_location is not None and args.config is None:
        args.usage_error("--expert-location needs --config: SGLang numbers the layers without experts too")
    sizes = model_sizes.read(args)
    trace = (
        _synthetic(sizes, args.seed)
        if args.synthetic
        else options.read_trace(args.trace, num_experts=sizes.num_experts, window=args.window)
    )
    if sizes.num_experts not in (None, trace.num_experts):
        raise ValueError(
            f"trace and model have the same experts: the trace has {trace.num_experts}, and --config or --num-experts "
            f"says {sizes.num_experts}"
        )
    options.check_folders(args, "output", "expert_location")
    if not args.json:
        print(_describe(trace), file=sys.stderr)
    result = compare(
        trace,
        args.ep,
        _cost(args, sizes),
        strategies=args.strategies,
        num_slots=args.num_slots,
        num_groups=sizes.num_groups,
        num_nodes=args.num_nodes,
        replica_choice=args.replica_choice,
        deduplicate=args.deduplicate,
        before=None if args.before is None else _read_placements(args.before, args, sizes, trace),
        given={file: _read_placements(file, args, sizes, trace) for file in args.include or ()},
        device_slots=args.device_slots,
        device_speeds=args.device_speeds,
        bound=args.bound,
        seed=args.seed,
    )
    best = result.best(args.by)
    if args.output is not None:
        Path(args.output).write_text(placements_to_json(result.placements[best]), encoding="utf-8")
    if args.expert_location is not None:
        _write_expert_location(args.expert_location, result.placements[best], sizes)
    _print(args, result, best)


def _print(args: argparse.Namespace, result: "Comparison", best: str) -> None:
    maps = None if args.expert_map is None else _expert_maps(result.placements[best], args.expert_map)
    if args.json:
        files = {"output": args.output, "expert_location": args.expert_location}
        print(json.dumps(result.to_dict() | {"best": best, "by": args.by, "expert_map": maps} | files))
        return
    print(result.to_table())
    for layer, slots in enumerate(maps or ()):
        print(f"{best}, MoE layer {layer}, rank {args.expert_map}: {' '.join(map(str, slots))}")
    for name, reason in result.skipped.items():
        print(f"{name} left out: {reason}", file=sys.stderr)
    written = f", written to {args.output}" if args.output is not None else ""
    print(f"best by {args.by}: {best}{written}", file=sys.stderr)
    if args.expert_location is not None:
        placement = result.placements[best][0]
        print(
            f"for SGLang: --init-expert-location {args.expert_location} "
            f"--ep-num-redundant-experts {placement.num_slots - placement.num_experts}",
            file=sys.stderr,
        )


def _expert_maps(placements: Sequence["ExpertPlacement"], rank: int) -> list[list[int]]:
    from jaxmoe.interop import expert_map

    return [expert_map(placement, rank).tolist() for placement in placements]


def _write_expert_location(file: str, placements: Sequence["ExpertPlacement"], sizes: ModelSizes) -> None:
    from jaxmoe.interop import expert_location_json

    if sizes.moe_layers is None or sizes.num_layers is None:
        raise ValueError(
            "--expert-location takes the number of layers from --config, whose config.json does not say it"
        )
    Path(file).write_text(expert_location_json(placements, sizes.moe_layers, sizes.num_layers), encoding="utf-8")


def _read_placements(
    file: str, args: argparse.Namespace, sizes: ModelSizes, trace: "RoutingTrace"
) -> list["ExpertPlacement"]:
    """Read one placement for each MoE layer from a file of jaxmoe or of SGLang."""
    from jaxmoe.interop import placements_from_expert_location
    from jaxmoe.placement import ExpertPlacement, placements_from_json

    text = options.read_placement_text(file)
    if '"physical_to_logical_map"' in text:
        return placements_from_expert_location(
            text, ep=args.ep, num_experts=trace.num_experts, moe_layers=sizes.moe_layers
        )
    read = placements_from_json(text)
    return [read] * trace.num_layers if isinstance(read, ExpertPlacement) else read


def _synthetic(sizes: ModelSizes, seed: int) -> "RoutingTrace":
    from jaxmoe.placement.synthetic import synthetic_trace

    if sizes.num_experts is None or sizes.experts_per_token is None or sizes.moe_layers is None:
        raise ValueError("--synthetic takes the numbers of experts, choices and layers from --config")
    return synthetic_trace(
        num_experts=sizes.num_experts,
        experts_per_token=sizes.experts_per_token,
        num_layers=len(sizes.moe_layers),
        seed=seed,
    )


def _cost(args: argparse.Namespace, sizes: ModelSizes) -> "CostModel":
    from jaxmoe.placement.cost import CostModel

    if sizes.hidden_size is None or sizes.moe_intermediate_size is None:
        raise ValueError(
            "bytes and times need the model's widths: pass --config, or --hidden-size and --moe-intermediate-size"
        )
    return CostModel.for_sizes(
        hidden_size=sizes.hidden_size,
        moe_intermediate_size=sizes.moe_intermediate_size,
        gated=sizes.gated,
        weight_bytes=args.weight_bytes,
        activation_bytes=args.activation_bytes,
    )


def _describe(trace: "RoutingTrace") -> str:
    tokens = "counts only" if trace.expert_ids is None else f"{trace.expert_ids.shape[0]} tokens"
    return (
        f"{trace.num_layers} layers of {trace.num_experts} experts, {trace.num_windows} windows, {tokens}; "
        f"placed on the first half, judged on the second"
    )
