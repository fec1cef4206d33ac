"""Times every grouped matmul that can run here, side by side: jaxmoe's backends, XLA's, torch's and tokamax's.

The shapes are the experts of published models; an operation is the product with gate and up, that with down, or the whole
MLP. Sides have turns one after the other, round after round; a turn is several calls with other rows, other group sizes
and, where memory allows, other matrices. Beside the median time of a call stand the relative error against float64 of
some of its rows, and the fraction of the floor: the least time for the operations and bytes, at the rates that a dense
product and a copy reach here. Sides that cannot do a case are listed with the reason.

On a CPU the widths are divided by 8 and tokens end at 128, unless options say otherwise. Written for any GPU that jax
serves; so far it has run on CPUs only.

    python scripts/bench_kernels.py
    python scripts/bench_kernels.py --shapes mixtral-8x7b --tokens 4096 --backends portable torch_grouped_mm
    python scripts/bench_kernels.py --shapes 128,8,512,384 --scale 1 --tokens 4 128 --operations mlp --dtype float32
    python scripts/bench_kernels.py --json kernels.json --roofline kernels.png
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from jaxmoe.cli.options import count
from scripts._bench.cases import OPERATIONS, ROUTINGS, TOKENS, Case, Shape, floor_of
from scripts._bench.ceilings import Ceilings, measure_ceilings
from scripts._bench.inputs import VARIANTS, Layer, exact_sample, make_layers, make_variants, to_float64
from scripts._bench.options import add_shapes, new_file, picture
from scripts._bench.report import check_error, machine, plot_roofline, print_cases, reason, warn_if_busy, write_json
from scripts._bench.sides import SIDES_HELP, Side, Turn, all_sides
from scripts._bench.timing import take_turns

CPU_SCALE, CPU_TOKENS = 8, (1, 32, 128)
QUICK = Shape(4, 2, 64, 32)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, write."""
    # Or jax would take most of a GPU at once, and torch could not have its part.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args = parse_arguments(argv)
    device = jax.devices()[0]
    console = Console(width=None if sys.stdout.isatty() else 120)
    here = machine(device)
    warn_if_busy(here)
    on_cpu = device.platform == "cpu"
    scale = args.scale or (CPU_SCALE if on_cpu and not args.quick else 1)
    tokens = args.tokens or ((1, 16) if args.quick else CPU_TOKENS if on_cpu else TOKENS)
    shapes = [("quick", QUICK)] if args.quick else [(name, shape.scaled(scale)) for name, shape in args.shapes]
    sides = [side for side in all_sides() if not args.backends or side.name in args.backends]
    results: list[dict[str, Any]] = []

    def save() -> None:
        """What there is so far, so that a run may be cut short."""
        if args.json:
            now = here | {"load_at_the_end": os.getloadavg()[0]}
            write_json(args.json, {"machine": now, "scale": scale, "cases": results})

    for dtype in args.dtype:
        for name, shape in shapes:
            say(f"{name}, {dtype}: making matrices")
            try:
                layers = make_layers(shape, dtype, device)
            except MemoryError as error:
                say(f"{name}, {dtype}: left out, {error}")
                results.append({"shape": name, "dtype": dtype, "left_out": str(error)})
                save()
                continue
            ceilings = measure_ceilings(dtype, device, quick=args.quick)
            for operation in args.operations:
                cases = [Case(name, shape, operation, T, routing, dtype) for T in tokens for routing in args.routings]
                done = [measure(case, layers, sides, ceilings, args) for case in cases]
                print_cases(console, title(cases[0], scale, ceilings), done)
                results += done
                save()
            del layers
    measured = [case for case in results if "sides" in case]
    if args.roofline and measured:
        plot_roofline(args.roofline, measured)


def measure(
    case: Case, layers: list[Layer], sides: Sequence[Side], ceilings: Ceilings, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything about one case, as it goes into the JSON."""
    say(f"{case.name}, {case.dtype}, {case.operation}, {case.tokens} tokens, {case.routing}")
    variants = make_variants(case, layers)
    sample = exact_sample(case, variants[0])
    turns: dict[str, Turn] = {}
    lines: dict[str, dict[str, Any]] = {}
    for side in sides:
        try:
            turn = side.prepare(case, variants)
            error = check_error(sample.error(to_float64(turn(), sample.rows)), case.dtype)
        except Exception as refusal:  # whatever it is, it is listed
            lines[side.name] = {"side": side.name, "refused": reason(refusal)}
        else:
            turns[side.name], lines[side.name] = turn, {"side": side.name, "error": error}
    touched = float(np.mean([np.count_nonzero(variant.host_sizes) for variant in variants]))
    floor = floor_of(case, touched, jnp.dtype(case.dtype).itemsize)
    floor_seconds = floor.seconds(*ceilings)
    for name, taken in take_turns(turns, rounds=args.rounds, budget_s=args.seconds).items():
        seconds = statistics.median(taken) / VARIANTS
        lines[name] |= {"seconds": seconds, "of_floor": floor_seconds / seconds, "turns": taken}
    return {
        "shape": case.name,
        **case.shape._asdict(),
        "dtype": case.dtype,
        "operation": case.operation,
        "tokens": case.tokens,
        "routing": case.routing,
        "rows": case.rows,
        "touched": touched,
        "flops": floor.flops,
        "bytes": floor.nbytes,
        "floor_seconds": floor_seconds,
        "ceilings": ceilings._asdict(),
        "sides": list(lines.values()),
    }


def title(case: Case, scale: int, ceilings: Ceilings) -> str:
    """What stands above a table."""
    G, K, D, F = case.shape
    divided = f" (widths divided by {scale})" if scale > 1 else ""
    return (
        f"{case.name}{divided}, {case.operation}, {case.dtype}: {G} experts, {K} a token, width {D}, expert width {F}; "
        f"ceilings {ceilings.flops_per_second / 1e12:.2f} TFLOP/s, {ceilings.bytes_per_second / 1e9:.0f} GB/s"
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=f"sides:\n{SIDES_HELP}"
    )
    known = [side.name for side in all_sides()]
    add_shapes(parser)
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="default: all")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS), help="default: all")
    parser.add_argument("--tokens", nargs="+", type=count, help=f"default: {TOKENS}; on a CPU {CPU_TOKENS}")
    parser.add_argument("--backends", nargs="+", choices=known, metavar="SIDE", help="sides, see below (default: all)")
    parser.add_argument("--dtype", nargs="+", choices=["bfloat16", "float16", "float32"], default=["bfloat16"])
    parser.add_argument("--scale", type=count, help=f"divide the widths by this (default: 1; on a CPU {CPU_SCALE})")
    parser.add_argument("--rounds", type=count, default=7, help="turns of each side (default: 7)")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="a side that has worked so long on a case has no more turns (5)"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny shape, to see whether it works")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything there")
    parser.add_argument("--roofline", type=picture, metavar="FILE.png", help="draw it there (needs matplotlib)")
    return parser.parse_args(argv)


def say(text: str) -> None:
    """One line of what is going on, on stderr."""
    print(f"· {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
