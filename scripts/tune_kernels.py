"""Finds the fastest tiles of a kernel on the GPU at hand and notes them down for `tile_table.lookup`.

For each shape and number of tokens, every candidate that the kernel names is compiled, compared with float64, and timed in
turns with the kernel's own choice: for gate and up with the activation, as part of a whole MLP, and for the product with
down. Tiles that beat that choice go into the table of this kind of device, a JSON file, after every case, so that a run may
be cut short. Written for GPUs; it has not run on one yet, and no table ships.

    python scripts/tune_kernels.py --kernel mosaic_gpu
    python scripts/tune_kernels.py --kernel triton --shapes mixtral-8x7b --tokens 4096 --tables /tmp/tables
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp

from jaxmoe.cli.options import count
from jaxmoe.kernels.grouped_matmul import check_backend, combine_halves
from jaxmoe.kernels.grouped_matmul.backends import GPU_BACKENDS
from jaxmoe.kernels.grouped_matmul.tile_table import row_class, user_tables, write_table
from scripts._bench.cases import TOKENS, Case
from scripts._bench.inputs import Layer, Variant, make_layers, make_variants
from scripts._bench.options import add_shapes
from scripts._bench.tuning import Tuned, WithTiles, tune

# A layer takes the sums of the second product as they are, for it adds them up over experts.
DOWN_DTYPE = jnp.dtype(jnp.float32)
# From a kernel's module, rows, matrices [G, halves·N, K], halves and kind of device to the tiles that may be good for them.
CANDIDATES: dict[str, Callable[[Any, jax.Array, jax.Array, int, str], Sequence[Any]]] = {
    "mosaic_gpu": lambda kernel, rows, matrices, halves, device_kind: kernel.candidate_tiles(
        kernel.problem_of(rows, matrices, halves, rows.dtype if halves == 2 else DOWN_DTYPE, device_kind)
    ),
    "triton": lambda kernel, rows, matrices, halves, device_kind: kernel.candidate_tiles(
        rows.shape[0], matrices.shape[0], matrices.shape[2], matrices.shape[1], rows.dtype.itemsize
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, tune case after case."""
    args = parse_arguments(argv)
    device = jax.devices()[0]
    try:
        check_backend(args.kernel, device)
    except NotImplementedError as error:
        raise SystemExit(f"tune_kernels.py: {error}") from error
    kernel = importlib.import_module(GPU_BACKENDS[args.kernel].module)
    for name, shape in args.shapes:
        try:
            layers = make_layers(shape, args.dtype, device)
        except MemoryError as error:
            print(f"{name}: left out, {error}", flush=True)
            continue
        # Several numbers of tokens may be of one class; the largest stands for it.
        tokens = {row_class(T * shape.per_token / shape.experts): T for T in sorted(args.tokens)}
        for T in tokens.values():
            for operation in ("mlp", "down"):
                tune_case(kernel, Case(name, shape, operation, T, "uniform", args.dtype), layers, device, args)


def tune_case(
    kernel: ModuleType, case: Case, layers: list[Layer], device: jax.Device, args: argparse.Namespace
) -> None:
    """Tune one case, say what came out, write it down."""
    where = f"{case.name} {'gate_up' if case.operation == 'mlp' else 'down'}, {case.tokens} tokens"
    variants = make_variants(case, layers)
    try:
        candidates = list_candidates(args.kernel, kernel, case, variants[0], device.device_kind)
        tuned = tune(with_tiles(kernel, case, device.device_kind), candidates, case, variants, rounds=args.rounds)
    except (NotImplementedError, MemoryError, ArithmeticError) as error:
        print(f"{where}: {error}", flush=True)
        return
    print(f"{where}: {len(tuned.seconds)} candidates, {len(tuned.refused)} refused", flush=True)
    for tiles, why in tuned.refused.items():
        print(f"  {tiles}: {why}")
    for tiles, seconds in [("its own choice", tuned.default_seconds), *list(tuned.seconds.items())[:3]]:
        print(f"  {seconds * 1e6:10.1f} us  {tiles}", flush=True)
    if tuned.best():
        table = {"device": device.device_kind, "entries": [entry(args.kernel, case, tuned)]}
        print(f"  into {write_table(table, args.tables)}", flush=True)


def list_candidates(name: str, kernel: ModuleType, case: Case, variant: Variant, device_kind: str) -> Sequence[Any]:
    """The tiles of the product that is tuned: gate and up of an MLP, or down."""
    fused = case.operation == "mlp"
    matrices = variant.layer.matrices(case.operation)[0]
    return CANDIDATES[name](kernel, variant.rows, matrices, 2 if fused else 1, device_kind)


def with_tiles(kernel: ModuleType, case: Case, device_kind: str) -> WithTiles:
    """The kernel for a kind of device, for `tuning.tune`; of an MLP the tiles are those of the first product."""

    def bind(tiles: Any) -> Callable[..., jax.Array]:
        def down(rows: jax.Array, matrices: jax.Array, sizes: jax.Array) -> jax.Array:
            return kernel.grouped_matmul(
                rows, matrices, sizes, out_dtype=DOWN_DTYPE, device_kind=device_kind, tiles=tiles
            )

        def mlp(rows: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
            return kernel.expert_mlp(
                rows,
                up,
                down,
                sizes,
                b_up_pN=None,
                b_down_pD=None,
                combine=combine_halves("silu", None, gated=True),
                out_dtype=rows.dtype,
                device_kind=device_kind,
                tiles=(tiles, None),
            )

        return mlp if case.operation == "mlp" else down

    return bind


def entry(name: str, case: Case, tuned: Tuned) -> dict[str, Any]:
    """A line of the tile table."""
    best = tuned.best()
    N, K = case.matrices[0]
    return {
        "kernel": f"{name}.gate_up" if case.operation == "mlp" else name,
        "dtype": case.dtype,
        "out_dtype": case.dtype if case.operation == "mlp" else DOWN_DTYPE.name,
        "K": K,
        "N": N,
        "row_class": row_class(case.rows / case.shape.experts),
        "tiles": dataclasses.asdict(best),
        "rows": case.rows,
        "groups": case.shape.experts,
        "seconds": tuned.seconds[best],
        "default_seconds": tuned.default_seconds,
        "jax": jax.__version__,
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", required=True, choices=CANDIDATES, help="a backend that has tiles")
    add_shapes(parser)
    parser.add_argument("--tokens", nargs="+", type=count, default=TOKENS, help=f"default: {TOKENS}")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=count, default=7, help="turns of each candidate (default: 7)")
    parser.add_argument(
        "--tables", type=Path, default=user_tables(), help="folder of the tables (default: the user's own)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
