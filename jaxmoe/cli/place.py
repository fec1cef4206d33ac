"""``jaxmoe place``: a routing trace in, strategies side by side, the best placement out."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import options

if TYPE_CHECKING:
    from jaxmoe.placement import ExpertPlacement, RoutingTrace
    from jaxmoe.placement.compare import Comparison
    from jaxmoe.placement.cost import CostModel

HELP = "compare expert placements on a routing trace and write the best"


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """What placing needs to know of the model; None where neither an option nor a config says it."""

    hidden_size: int | None
    moe_intermediate_size: int | None
    num_experts: int | None
    experts_per_token: int | None
    num_moe_layers: int | None
    num_groups: int
    gated: bool


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

    group = parser.add_argument_group("model")
    group.add_argument("--config", metavar="DIR", help="a checkpoint directory; its config.json gives the sizes below")
    group.add_argument(
        "--num-experts", type=options.count, metavar="E", help="experts of a layer, where the trace is silent"
    )
    group.add_argument("--hidden-size", type=options.count, metavar="D", help="model width")
    group.add_argument("--moe-intermediate-size", type=options.count, metavar="F", help="width of an expert")
    group.add_argument("--num-groups", type=options.count, metavar="G", help="groups of a group-limited router (1)")
    group.add_argument("--weight-bytes", type=float, default=2, metavar="B", help="bytes per weight (2)")
    group.add_argument("--activation-bytes", type=float, default=2, metavar="B", help="bytes per number sent (2)")

    group = parser.add_argument_group("devices")
    group.add_argument("--ep", type=options.count, required=True, metavar="N", help="devices that share the experts")
    group.add_argument("--num-nodes", type=options.count, default=1, metavar="N", help="nodes they are on (1)")
    group.add_argument(
        "--num-slots", type=options.count, metavar="P", help="slots to fill, replicas included (one an expert)"
    )
    group.add_argument("--device-slots", type=_whole_numbers, metavar="9,9,4", help="room of each device, for weighted")
    group.add_argument("--device-speeds", type=_numbers, metavar="1,1,0.5", help="relative speed of each device")

    group = parser.add_argument_group("comparison")
    group.add_argument("--strategies", type=_names, metavar="A,B", help="strategies to compare (default: all)")
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
    group.add_argument("-o", "--output", metavar="FILE.json", help="write the best placement, for --placement")
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
    sizes = _sizes(args)
    trace = _synthetic(sizes, args.seed) if args.synthetic else _read(args, sizes)
    if sizes.num_experts not in (None, trace.num_experts):
        raise ValueError(
            f"trace and model have the same experts: the trace has {trace.num_experts}, and --config or --num-experts "
            f"says {sizes.num_experts}"
        )
    if args.output is not None and not Path(args.output).absolute().parent.is_dir():
        raise FileNotFoundError(f"the directory of --output {args.output} does not exist")
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
        before=None if args.before is None else _read_placements(args.before, trace),
        given={file: _read_placements(file, trace) for file in args.include or ()},
        device_slots=args.device_slots,
        device_speeds=args.device_speeds,
        bound=args.bound,
        seed=args.seed,
    )
    best = result.best(args.by)
    if args.output is not None:
        Path(args.output).write_text(placements_to_json(result.placements[best]), encoding="utf-8")
    _print(args, result, best)


def _print(args: argparse.Namespace, result: "Comparison", best: str) -> None:
    if args.json:
        print(json.dumps(result.to_dict() | {"best": best, "by": args.by, "output": args.output}))
        return
    print(result.to_table())
    for name, reason in result.skipped.items():
        print(f"{name} left out: {reason}", file=sys.stderr)
    written = f", written to {args.output}" if args.output is not None else ""
    print(f"best by {args.by}: {best}{written}", file=sys.stderr)


def _read(args: argparse.Namespace, sizes: _Sizes) -> "RoutingTrace":
    from jaxmoe.placement.trace_formats import read_trace

    for file in args.trace:
        if not Path(file).is_file():
            raise FileNotFoundError(f"the trace {file} is no file")
    return read_trace(args.trace, num_experts=sizes.num_experts, window=args.window, read_torch=_read_torch)


def _read_torch(path: Path) -> Any:
    from jaxmoe.checkpoint.formats import read_torch_object

    return read_torch_object(path)


def _read_placements(file: str, trace: "RoutingTrace") -> list["ExpertPlacement"]:
    from jaxmoe.placement import ExpertPlacement

    read = options.read_placement_file(file)
    return [read] * trace.num_layers if isinstance(read, ExpertPlacement) else read


def _synthetic(sizes: _Sizes, seed: int) -> "RoutingTrace":
    from jaxmoe.placement.synthetic import synthetic_trace

    if sizes.num_experts is None or sizes.experts_per_token is None or sizes.num_moe_layers is None:
        raise ValueError("--synthetic takes the numbers of experts, choices and layers from --config")
    return synthetic_trace(
        num_experts=sizes.num_experts,
        experts_per_token=sizes.experts_per_token,
        num_layers=sizes.num_moe_layers,
        seed=seed,
    )


def _sizes(args: argparse.Namespace) -> _Sizes:
    from jaxmoe.config import MoEConfig, pick, read_config_json
    from jaxmoe.models import FAMILIES, WRAPPERS, read_model_config

    config: Mapping[str, Any] = {} if args.config is None else read_config_json(args.config)
    if args.config is not None and config.get("model_type") in {*FAMILIES, *WRAPPERS}:
        decoder = read_model_config(args.config)[1]
        moes = [layer.feed_forward for layer in decoder.layers if isinstance(layer.feed_forward, MoEConfig)]
        if not moes:
            raise ValueError(f"{args.config}/config.json is of a model without experts: there is nothing to place")
        moe = moes[0]
        return _Sizes(
            hidden_size=args.hidden_size or moe.expert_input_size,
            moe_intermediate_size=args.moe_intermediate_size or moe.moe_intermediate_size,
            num_experts=args.num_experts or moe.num_experts,
            experts_per_token=moe.num_experts_per_tok,
            num_moe_layers=len(moes),
            num_groups=args.num_groups or moe.router.num_groups,
            gated=moe.gated,
        )
    # Of a family that is not known here, what its config calls by the usual names.
    config = pick(config, "text_config", default=config)

    def size(given: int | None, *names: str) -> int | None:
        value = given if given is not None else pick(config, *names, default=None)
        return None if value is None else int(value)

    layers, dense = size(None, "num_hidden_layers"), size(None, "first_k_dense_replace") or 0
    return _Sizes(
        hidden_size=size(args.hidden_size, "hidden_size"),
        moe_intermediate_size=size(args.moe_intermediate_size, "moe_intermediate_size", "intermediate_size"),
        num_experts=size(args.num_experts, "num_experts", "n_routed_experts", "num_local_experts"),
        experts_per_token=size(None, "num_experts_per_tok", "num_experts_per_token"),
        num_moe_layers=None if layers is None else layers - dense,
        num_groups=size(args.num_groups, "n_group") or 1,
        gated=True,
    )


def _cost(args: argparse.Namespace, sizes: _Sizes) -> "CostModel":
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


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers between commas, one a device; got {text!r}") from error


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"whole numbers between commas, one a device; got {text!r}") from error


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"names between commas; got {text!r}")
    return names
