"""``jaxmoe bench``: the cost of parts of jaxmoe; ``jaxmoe bench dispatch`` counts bytes and models time, from shapes."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxmoe.cli import options

if TYPE_CHECKING:
    from jaxmoe.dispatch import DispatchLayout

HELP = "tell what every way of dispatching tokens sends on a mesh, and how long that would take"


class Shape(NamedTuple):
    """Experts E, experts per token K, width D and experts' width F of a model's MoE layers."""

    experts: int
    experts_per_token: int
    hidden_size: int
    expert_width: int


SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "qwen3-235b": Shape(128, 8, 4096, 1536),
    "deepseek-v3": Shape(256, 8, 7168, 2048),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880),
    "gpt-oss-120b": Shape(128, 4, 2880, 2880),
}
MESHES = ("ep=8", "tp=2,ep=4", "dp=2,tp=2,ep=2", "tp=8")
TOKENS = (1, 32, 128, 4096)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe bench``."""
    parser.add_argument("what", choices=["dispatch"], help="what to look at")
    parser.add_argument("--model", action="append", choices=SHAPES, help="a model's shapes; may be repeated (all)")
    parser.add_argument(
        "--mesh",
        action="append",
        type=options.mesh_sizes,
        metavar="dp=1,tp=2,ep=4",
        help=f"mesh sizes; may be repeated ({'; '.join(MESHES)})",
    )
    parser.add_argument(
        "--tokens",
        action="append",
        type=options.count,
        metavar="T",
        help=f"tokens of all devices together; may be repeated ({', '.join(map(str, TOKENS))})",
    )
    options.add_expert_axes(parser)
    parser.add_argument("--dtype", default="bfloat16", help="of activations (bfloat16)")
    parser.add_argument(
        "--wire-dtype", metavar="float8_e4m3fn", help="what rows are rounded to on their way to experts"
    )
    parser.add_argument(
        "--platform", choices=["gpu", "cpu"], default="gpu", help="rates that time is modeled with (gpu)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON array, an object for each row")


def run(args: argparse.Namespace) -> None:
    """Print a row for each model, mesh, number of tokens and backend."""
    from jaxmoe.dispatch import check_wire_dtype
    from jaxmoe.layers import check_expert_axes

    check_expert_axes(args.expert_axes)
    check_wire_dtype(args.wire_dtype)
    rows = [
        row
        for model in args.model or SHAPES
        for mesh in args.mesh or map(options.mesh_sizes, MESHES)
        for tokens in args.tokens or TOKENS
        for row in _rows(model, tokens, _layout(SHAPES[model].experts, mesh, args), args)
    ]
    if args.json:
        print(json.dumps(rows))
    else:
        _print(rows)


def _layout(experts: int, mesh: dict[str, int], args: argparse.Namespace) -> "DispatchLayout":
    from jaxmoe.dispatch import DispatchLayout
    from jaxmoe.mesh import TP
    from jaxmoe.placement import ExpertPlacement

    devices = math.prod(mesh[axis] for axis in args.expert_axes)
    return DispatchLayout(
        mesh_shape=tuple(mesh.items()),
        expert_axes=args.expert_axes,
        partial_axes=() if TP in args.expert_axes else (TP,),
        num_slots=ExpertPlacement.linear(experts, devices).num_slots,
        wire_dtype=args.wire_dtype,
    )


def _rows(model: str, tokens: int, layout: "DispatchLayout", args: argparse.Namespace) -> list[dict[str, Any]]:
    import jax.numpy as jnp

    from jaxmoe.dispatch import DISPATCHES, RATES, DispatchShape, dispatch_cost, expected_bytes, explain_dispatch
    from jaxmoe.mesh import write_mesh

    shape = DispatchShape(
        tokens=tokens,
        choices=SHAPES[model].experts_per_token,
        width=SHAPES[model].hidden_size,
        itemsize=jnp.dtype(args.dtype).itemsize,
        layout=layout,
    )
    chosen = explain_dispatch(shape, args.platform).name
    rows = []
    for name, backend in DISPATCHES.items():
        if backend.reason_not_to(args.platform, layout):
            continue
        sent = expected_bytes(backend.collectives(shape))
        cost = dispatch_cost(backend, shape)
        rows.append(
            {
                "model": model,
                "mesh": write_mesh(dict(layout.mesh_shape)),
                "tokens": tokens,
                "dispatch": name,
                **{f"{part}_bytes": round(value) for part, value in sent._asdict().items()},
                "collectives": cost.collectives,
                "modelled_seconds": cost.seconds(RATES[args.platform]),
                "auto": name == chosen,
            }
        )
    return rows


def _print(rows: list[dict[str, Any]]) -> None:
    print("kB that a device sends in one round with even routing, and the time modeled for tokens to go and come back")
    line = "{:<14} {:<15} {:>6} {:<18} {:>10} {:>9} {:>10} {:>11} {:>9} {}"
    print(
        line.format(
            "model", "mesh", "tokens", "dispatch", "payload", "metadata", "padding", "collectives", "us", "auto"
        )
    )
    for row in rows:
        kilobytes = (f"{row[f'{part}_bytes'] / 1e3:.1f}" for part in ("payload", "metadata", "padding"))
        names = row["model"], row["mesh"], row["tokens"], row["dispatch"]
        microseconds = f"{row['modelled_seconds'] * 1e6:.1f}"
        print(line.format(*names, *kilobytes, row["collectives"], microseconds, "*" if row["auto"] else "").rstrip())
