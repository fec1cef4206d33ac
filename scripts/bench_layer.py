"""Times whole MoE layers, router to combine: jaxmoe's on meshes, by dispatch and kernels, against transformers'.

Every side has the same weights and tokens, and a turn a round. The other side is the sparse block of Qwen3-MoE (what
Mixtral's computes, too) with torch's grouped_mm, on one device; it takes part where torch and transformers are
installed. Beside the median time of a call stand tokens a second, the ratio to that block, and the difference of the
result from that of the dense reference in float32, relative to its norm; where a router in bfloat16 chooses another
expert, that is large. Sides that cannot run are listed with the reason.

On a CPU the devices are simulated, the widths divided by 8 and tokens end at 128, unless options say otherwise. Written
for any GPUs that jax serves; so far it has run on CPUs only.

    python scripts/bench_layer.py
    python scripts/bench_layer.py --shapes qwen3-30b-a3b --tokens 32 4096 --mesh ep=8 --kernels mosaic_gpu portable
    python scripts/bench_layer.py --shapes 64,8,512,384 --scale 1 --dtype float32 --json layer.json
"""

import argparse
import contextlib
import importlib.util
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

import jaxmoe
from jaxmoe.cli.options import count
from jaxmoe.config import MoEConfig
from jaxmoe.dispatch import DISPATCHES
from jaxmoe.kernels.grouped_matmul import BACKENDS, check_backend
from jaxmoe.kernels.grouped_matmul.backends import GPU_BACKENDS
from jaxmoe.layers import MoE
from jaxmoe.mesh import batch_axes, named, padded_batch, parse_mesh
from scripts._bench.cases import Shape
from scripts._bench.inputs import VARIANTS
from scripts._bench.options import add_shapes, mesh, new_file
from scripts._bench.report import check_finite, machine, print_refusals, reason, warn_if_busy, write_json
from scripts._bench.timing import take_turns

CPU_SCALE, CPU_TOKENS, TOKENS = 8, (1, 32, 128), (1, 32, 128, 4096, 16384)
CPU_MESHES, QUICK = ("ep=1", "tp=4", "ep=4"), Shape(8, 2, 64, 32)
TORCH = "transformers grouped_mm"

Turn = Callable[[], Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, print, write."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    args = parse_arguments(argv)
    simulated = max(math.prod(parse_mesh(mesh).values()) for mesh in args.mesh or CPU_MESHES)
    on_cpu = args.simulate or not _has_gpu(simulated)
    meshes = args.mesh or (CPU_MESHES if on_cpu else (f"ep={jax.device_count()}",))
    if on_cpu:
        jaxmoe.simulate_devices(simulated)
    scale = args.scale or (CPU_SCALE if on_cpu and not args.quick else 1)
    shapes = [("quick", QUICK)] if args.quick else [(name, shape.scaled(scale)) for name, shape in args.shapes]
    tokens = args.tokens or ((16,) if args.quick else CPU_TOKENS if on_cpu else TOKENS)
    here, results = machine(jax.devices()[0]), []
    warn_if_busy(here)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for name, shape in shapes:
        layers = {mesh: make_layer(shape, mesh, args.dtype) for mesh in meshes}
        for T in tokens:
            case = {"shape": name, **shape._asdict(), "dtype": args.dtype, "tokens": T}
            case["sides"] = measure(layers, shape, T, args)
            show(console, case, scale)
            results.append(case)
            if args.json:  # what there is so far, so that a run may be cut short
                now = here | {"load_at_the_end": os.getloadavg()[0]}
                write_json(args.json, {"machine": now, "scale": scale, "cases": results})


def _has_gpu(simulated: int) -> bool:
    """Whether jax runs on GPUs here; to ask starts it, so if it has none it starts with so many simulated devices."""
    with contextlib.suppress(RuntimeError):  # it has been started
        jax.config.update("jax_num_cpu_devices", simulated)
    return jax.default_backend() == "gpu"


def make_layer(shape: Shape, mesh: str, dtype: str) -> MoE:
    """The layer on a mesh; the same weights on every one."""
    config = MoEConfig(
        num_experts=shape.experts,
        num_experts_per_tok=shape.per_token,
        hidden_size=shape.width,
        moe_intermediate_size=shape.expert_width,
    )
    sizes = parse_mesh(mesh)
    devices = jax.devices()[: math.prod(sizes.values())]
    return MoE(config, mesh=jaxmoe.make_mesh(**sizes, devices=devices), dtype=dtype, rngs=nnx.Rngs(0))


def measure(layers: dict[str, MoE], shape: Shape, T: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A line for each side, timed or refused."""
    rng = np.random.default_rng(T)
    inputs = [rng.standard_normal((T, shape.width), np.float32) for _ in range(VARIANTS)]
    first = next(iter(layers.values()))
    exact = _float64(jaxmoe_turn(first, "auto", "reference", inputs[:1], "float32")())
    sides: dict[str, Callable[[], Turn]] = {
        f"{mesh} {dispatch} {kernels}": lambda layer=layer, dispatch=dispatch, kernels=kernels: jaxmoe_turn(
            layer, dispatch, kernels, inputs, args.dtype
        )
        for mesh, layer in layers.items()
        for dispatch in args.dispatch
        for kernels in args.kernels
    }
    sides[TORCH] = lambda: torch_turn(first, inputs, args.dtype)
    turns: dict[str, Turn] = {}
    lines: dict[str, dict[str, Any]] = {}
    for name, prepare in sides.items():
        try:
            turn = prepare()
            difference = check_finite(float(np.linalg.norm(_float64(turn()) - exact) / np.linalg.norm(exact)))
        except Exception as refusal:  # whatever it is, it is listed
            lines[name] = {"side": name, "refused": reason(refusal)}
        else:
            turns[name] = turn
            lines[name] = {"side": name, "difference": difference}
    for name, taken in take_turns(turns, rounds=args.rounds, budget_s=args.seconds).items():
        seconds = statistics.median(taken) / VARIANTS
        lines[name] |= {"seconds": seconds, "tokens_per_second": T / seconds, "turns": taken}
    for line in lines.values():
        if "seconds" in line and "seconds" in lines[TORCH]:
            line["ratio"] = lines[TORCH]["seconds"] / line["seconds"]
    return list(lines.values())


def jaxmoe_turn(layer: MoE, dispatch: str, kernels: str, inputs: Sequence[np.ndarray], dtype: str) -> Turn:
    """The layer applied to each of the inputs, each a call of its own.

    Raises:
        ValueError: there is no such backend.
        NotImplementedError: one of the backends cannot run on these devices.
    """
    layer.check_dispatch(dispatch)
    if kernels != "auto":
        check_backend(kernels, layer.mesh.devices.flat[0])
    layer.kernels = kernels
    graph, state = nnx.split(layer)
    if dtype == "float32":
        state = jax.tree.map(lambda array: array.astype(dtype) if array.dtype != np.int32 else array, state)
    T = len(inputs[0])
    split = padded_batch(layer.mesh, T) == T  # else the layer pads them before it splits them
    sharding = named(layer.mesh, (batch_axes(layer.mesh, T) if split else None) or None)
    tokens = [jax.device_put(jax.numpy.asarray(x_TD, dtype), sharding) for x_TD in inputs]
    call = jax.jit(lambda state, x_TD: nnx.merge(graph, state)(x_TD, dispatch=dispatch)[0])

    def turn() -> jax.Array:
        outs = [jax.block_until_ready(call(state, x_TD)) for x_TD in tokens]
        return outs[0]

    return turn


def torch_turn(layer: MoE, inputs: Sequence[np.ndarray], dtype: str) -> Turn:
    """Transformers' block with that layer's weights.

    Raises:
        NotImplementedError: torch or transformers is missing, or sees no GPU.
    """
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise NotImplementedError(f"{package} is not installed")
    from scripts._bench import torch_layer

    return torch_layer.prepare(layer, inputs, dtype, layer.mesh.devices.flat[0].platform)


def _float64(out: Any) -> np.ndarray:
    out = out.float().cpu().numpy() if hasattr(out, "detach") else np.asarray(out.astype(np.float32))
    return out.astype(np.float64)


def show(console: Console, case: dict[str, Any], scale: int) -> None:
    """Print a table of one number of tokens."""
    divided = f" (widths divided by {scale})" if scale > 1 else ""
    title = (
        f"{case['shape']}{divided}, {case['dtype']}, {case['tokens']} tokens: {case['experts']} experts, "
        f"{case['per_token']} a token, width {case['width']}, expert width {case['expert_width']}"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("mesh, dispatch, kernels")
    for name in ("ms", "tokens/s", "times transformers", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for side in case["sides"]:
        if "seconds" in side:
            ratio = f"{side['ratio']:.2f}" if "ratio" in side else ""
            figures = f"{side['seconds'] * 1e3:.3f}", f"{side['tokens_per_second']:.0f}", ratio
            table.add_row(side["side"], *figures, f"{side['difference']:.1e}")
    console.print(table)
    print_refusals(console, [(side["side"], side["refused"]) for side in case["sides"] if "refused" in side])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shapes(parser)
    parser.add_argument("--tokens", nargs="+", type=count, help=f"default: {TOKENS}; on a CPU {CPU_TOKENS}")
    parser.add_argument(
        "--mesh",
        nargs="+",
        type=mesh,
        help=f"meshes, such as tp=2,ep=4 (default: ep over all GPUs; on a CPU {CPU_MESHES})",
    )
    parser.add_argument("--dispatch", nargs="+", choices=["auto", *DISPATCHES], default=["auto", *DISPATCHES])
    kernels = ["auto", *(name for name in [*BACKENDS, *GPU_BACKENDS] if name != "reference")]
    parser.add_argument("--kernels", nargs="+", choices=kernels, default=kernels[1:], help="default: all but auto")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--simulate", action="store_true", help="simulated CPU devices even where there are GPUs")
    parser.add_argument("--scale", type=count, help=f"divide the widths by this (default: 1; on a CPU {CPU_SCALE})")
    parser.add_argument("--rounds", type=count, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--seconds", type=float, default=5.0, help="a side that worked so long has no more turns (5)")
    parser.add_argument("--quick", action="store_true", help="one tiny shape, to see whether it works")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
