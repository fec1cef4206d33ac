"""The options of ``jaxmoe plan``, and which of them go together."""

import argparse

from jaxmoe.cli import options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe plan``."""
    parser.add_argument(
        "checkpoint",
        metavar="PATH",
        help="a checkpoint directory, or a name in the hub's cache; its config.json is enough, and of weights that are "
        "there the headers are read",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--mesh",
        type=options.mesh_sizes,
        metavar="dp=1,tp=2,ep=4",
        help="mesh sizes, axes left out being 1 (default: one device)",
    )
    where.add_argument(
        "--devices",
        type=options.counts,
        metavar="N[,N...]",
        help="try every mesh of N devices, and rank them by modeled time; several numbers are compared",
    )
    options.add_placement(parser, default=None)
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
        "--prompt-length",
        type=options.count,
        metavar="S",
        help="tokens of each in the prefill, for what a step needs besides and for times (half of --max-length)",
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
    group = parser.add_argument_group("what if", "with --device; tables of modeled times")
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="a routing trace as for jaxmoe place, in place of even routing: its first half makes placements, and its "
        "second half gives the load of every expert",
    )
    group.add_argument(
        "--compare-placements",
        type=options.names,
        metavar="NAME|FILE.json,...",
        help="placements side by side: skew, bytes sent, and the times of both steps",
    )
    group.add_argument(
        "--redundancy",
        type=options.integers,
        metavar="0,1,2",
        help="slots of each device for replicas, side by side: memory, room for sequences, skew and times (of eplb with a "
        "trace, where no placement is named)",
    )
    group.add_argument(
        "--price-per-hour",
        type=float,
        metavar="PRICE",
        help="price of a device, for what a million tokens cost on --devices",
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
        help="also compile prefill and decode for these GPUs, which need not be there, and compare (needs the extra aot); "
        "of layers that repeat, two repetitions",
    )
    parser.add_argument(
        "--every-layer", action="store_true", help="compile all layers with --compile, in an hour or so"
    )
    parser.add_argument("--html", metavar="FILE", help="write the answer as one page with pictures (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: two of them contradict each other, or one says nothing without another that is not there.
    """
    timed = ("devices", "sweep", "compile", "trace", "compare_placements", "redundancy")
    if args.device is None and any(getattr(args, name) for name in timed):
        raise ValueError(
            f"{', '.join('--' + name.replace('_', '-') for name in timed)} are for a kind of device: name it with "
            "--device, such as h100"
        )
    if args.measured and not any(getattr(args, name) for name in timed if name != "compile"):
        raise ValueError(
            "--measured is for modeled times: give --devices, --sweep or a comparison of placements with it"
        )
    if args.compile and (args.adapter or args.mtp or args.quantized != "keep"):
        raise ValueError(
            "--compile compiles a model's own weights as jaxmoe.load keeps them, without layers for multi-token prediction; "
            "leave --adapter, --mtp and --quantized out"
        )
    if args.every_layer and not args.compile:
        raise ValueError("--every-layer says what --compile compiles; give both")
    if (args.adapter or args.activations) and any(
        getattr(args, name) for name in timed if name not in ("devices", "compile")
    ):
        raise ValueError("times and comparisons are of a model's own weights; leave --adapter and --activations out")
    if args.price_per_hour is not None and args.devices is None:
        raise ValueError("--price-per-hour is for --devices; name numbers of devices, such as --devices 8,16")
    if args.placement is not None and args.compare_placements is not None:
        raise ValueError("--compare-placements names the placements; leave --placement out, or add it to them")
    if args.devices is None:
        return
    if args.expert_axes is not None:
        raise ValueError("--devices tries every way of sharing the experts; leave --expert-axes out, or give a --mesh")
    if any(name.endswith(".json") for name in [args.placement or "", *(args.compare_placements or [])]):
        raise ValueError(
            "a file of placements is for one number of devices that share the experts; give a --mesh with it"
        )
    if args.adapter or args.activations:
        raise ValueError("--devices ranks a model's own weights; give a --mesh to plan --adapter or --activations")
