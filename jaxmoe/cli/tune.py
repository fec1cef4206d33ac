"""``jaxmoe tune``: times the tiles of GPU kernels on the machine at hand and notes the fastest for ``kernels="auto"``."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import options
from jaxmoe.cli.bench import SHAPES, Shape

if TYPE_CHECKING:
    import jax

    from jaxmoe.kernels.grouped_matmul.tuning import TuningCase

HELP = "time the kernels' tiles for a model's experts on this machine's GPU and write the user's table of them"

TOKENS = (1, 32, 128, 1024, 4096)
KERNELS = ("mosaic_gpu", "triton")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe tune``."""
    parser.add_argument("checkpoint", nargs="?", metavar="DIR", help="a checkpoint; only its config.json is read")
    parser.add_argument("--model", action="append", choices=SHAPES, help="a model's shapes; may be repeated")
    parser.add_argument(
        "--mesh",
        type=options.mesh_sizes,
        default={},
        metavar="tp=2,ep=4",
        help="mesh that the model will be on: a device has a part of the experts, and of their width (ep=1)",
    )
    parser.add_argument(
        "--tokens",
        action="append",
        type=options.count,
        metavar="T",
        help=f"tokens of each device; may be repeated ({', '.join(map(str, TOKENS))})",
    )
    parser.add_argument(
        "--kernel", action="append", choices=KERNELS, help="a kernel; may be repeated (all that run here)"
    )
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of rows and weights (bfloat16)"
    )
    parser.add_argument("--tables", type=Path, metavar="DIR", help="folder of the tables (the user's own)")
    parser.add_argument("--json", action="store_true", help="one JSON array, an object for each product and kernel")


def run(args: argparse.Namespace) -> None:
    """Tune product after product; what is found is in the table at once, so that a run may be cut short."""
    if args.checkpoint is None and not args.model:
        args.usage_error("name a checkpoint, or a model by --model")
    import jax

    from jaxmoe.kernels.grouped_matmul.tile_table import user_tables

    cases = _cases(args)
    device = jax.devices()[0]
    kernels = _kernels(args, device)
    tables = args.tables or user_tables()
    results = []
    for case in cases:
        for kernel in kernels:
            result = _tune(kernel, case, device, tables)
            results.append(result)
            if not args.json:
                print(_line(result), flush=True)
    if args.json:
        print(json.dumps(results))
    if results and all("refused" in result for result in results):
        raise ValueError(f"nothing could be tuned: {results[0]['refused']}")


def _kernels(args: argparse.Namespace, device: "jax.Device") -> list[str]:
    """List the kernels that run here: each that is named has to, else one at least."""
    from jaxmoe.kernels.grouped_matmul import check_backend

    able, refusals = [], []
    for kernel in args.kernel or KERNELS:
        try:
            check_backend(kernel, device)
        except NotImplementedError as refusal:
            refusals.append(str(refusal))
        else:
            able.append(kernel)
    if refusals and (args.kernel or not able):
        raise ValueError(f"tuning wants a GPU that runs the kernels: {'; '.join(refusals)}")
    return able


def _cases(args: argparse.Namespace) -> list["TuningCase"]:
    from jaxmoe.kernels.grouped_matmul.tuning import cases_of

    shapes = {name: SHAPES[name] for name in args.model or ()}
    if args.checkpoint is not None:
        shapes[args.checkpoint] = _shape_of(args.checkpoint)
    ep, tp = args.mesh.get("ep", 1), args.mesh.get("tp", 1)
    found = []
    for name, shape in shapes.items():
        if shape.expert_width % tp:
            raise ValueError(f"tp must divide the experts' width: {name} has {shape.expert_width}, --mesh has tp={tp}")
        found += cases_of(
            name,
            experts=-(-shape.experts // ep),
            per_token=shape.experts_per_token,
            width=shape.hidden_size,
            expert_width=shape.expert_width // tp,
            tokens=args.tokens or TOKENS,
            dtype=args.dtype,
        )
    return found


def _shape_of(directory: str) -> Shape:
    """Experts, experts per token and widths, by config.json; experts without a gate have no kernel with tiles of its own."""
    from jaxmoe.config import MoEConfig
    from jaxmoe.models import read_model_config

    layers = read_model_config(directory)[1].layers
    moe = next((layer.feed_forward for layer in layers if isinstance(layer.feed_forward, MoEConfig)), None)
    if moe is None or not moe.gated:
        raise ValueError(
            f"{directory} has no experts with a gate, whose tiles could be tuned: use --model for named shapes"
        )
    return Shape(moe.num_experts, moe.num_experts_per_tok, moe.expert_input_size, moe.moe_intermediate_size)


def _tune(kernel: str, case: "TuningCase", device: "jax.Device", tables: Path) -> dict[str, Any]:
    import jax

    from jaxmoe.kernels.grouped_matmul.tile_table import write_table
    from jaxmoe.kernels.grouped_matmul.tuning import entry_of, tune

    result: dict[str, Any] = {"case": str(case), "kernel": kernel}
    try:
        tuned = tune(kernel, case, device)
    except (NotImplementedError, ArithmeticError, jax.errors.JaxRuntimeError) as refusal:
        return result | {"refused": (str(refusal).splitlines() or [type(refusal).__name__])[0]}
    best = tuned.best()
    result |= {
        "candidates": len(tuned.seconds),
        "refused_candidates": {str(tiles): why for tiles, why in tuned.refused.items()},
        "default_seconds": tuned.default_seconds,
        "seconds": tuned.default_seconds if best is None else tuned.seconds[best],
        "tiles": None if best is None else str(best),
        "table": None,
    }
    if best is not None:
        table = {"device": device.device_kind, "entries": [entry_of(kernel, case, tuned)]}
        result["table"] = str(write_table(table, tables))
    return result


def _line(result: dict[str, Any]) -> str:
    where = f"{result['case']}, {result['kernel']}"
    if "refused" in result:
        return f"{where}: {result['refused']}"
    count = f"{result['candidates']} candidates right, {len(result['refused_candidates'])} refused"
    own = f"{result['default_seconds'] * 1e6:.1f} us by its own choice"
    if result["tiles"] is None:
        return f"{where}: {own}, none faster; {count}"
    return f"{where}: {result['seconds'] * 1e6:.1f} us by {result['tiles']}, {own}; {count}; into {result['table']}"
