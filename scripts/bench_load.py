#!/usr/bin/env python3
"""How fast does jaxmoe load a checkpoint onto a simulated (2, 2, 2) mesh, and how fast is a quantized one?

It writes a checkpoint of more than 1 GB with Qwen3-MoE's names into a temporary directory, loads it in turns with

* jaxmoe: expert stacks sharded over ep and tp, replicated over dp;
* safetensors.flax.load_file, then jax.device_put tensor by tensor, each expert whole on one device;

and reads it into memory without doing anything with it, once into memory already in use and once into fresh memory,
which is what the hardware permits.

With --format it tells of each quantized format at which rate it is decoded, in GB of output in a second of one core's time.
Then it writes a checkpoint whose experts are in the format, with gpt-oss' names and widths where that is its own and with
Qwen3-MoE's elsewhere, and one of the same family in bfloat16 of about as many bytes, and loads both in turns: the quantized
one with its weights kept packed, where the format has a packed form.

With --small it loads 128 experts in each of 4 layers, of width 128 in a model of width 256, onto a (1, 1, 8) mesh, in each
format that stays packed, and tells the processor time of the load and of its steps: that of work for each tensor.

With --orbax it loads a checkpoint with `jaxmoe.load`, and the same as Orbax arrays (jaxmoe convert --to orbax): with
jaxmoe.load, and as Orbax restores it, from the arrays that jaxmoe writes and from those that Orbax does; in turns, once from
the disk (its files are dropped from the page cache before) and once from the page cache. --format NAME with it takes a
quantized checkpoint.

Without --orbax the page cache is warm for all of them: this measures software, not the disk. Removes what it wrote, also on
Ctrl-C.
safetensors comes with the extra "test".

    python scripts/bench_load.py
    python scripts/bench_load.py --dtype float32 --json
    python scripts/bench_load.py --format mxfp4 fp8_block
    python scripts/bench_load.py --small --format nvfp4_pack gptq fp8_block
    python scripts/bench_load.py --orbax
    python scripts/bench_load.py --orbax --format fp8_block
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxmoe.checkpoint import (
    Block,
    LoadReport,
    expert_blocks,
    load_arrays,
    make_load_plan,
    open_checkpoint,
    whole_tensor_blocks,
)
from jaxmoe.checkpoint.loading import aligned_array, plan_packed, run_in_threads
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, pack_model
from jaxmoe.layers import param_specs
from jaxmoe.layers.param import ParamSpec
from jaxmoe.mesh import make_mesh, simulate_devices
from jaxmoe.models import Decoder
from jaxmoe.models.family import MLP_EXPERTS
from jaxmoe.quant.formats import FORMATS
from scripts._bench import restores, small_experts
from scripts._bench.formats import CASES, decode_rate, make_weight
from scripts._bench.formats import write_checkpoint as write_in_format

# Qwen3-30B-A3B's widths; its 128 experts and 48 layers are cut down to the size asked for.
MODEL, WIDTH, VOCAB = 2048, 768, 32768
EXPERTS = 32
DTYPES = {"bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)), "float32": ("F32", np.dtype(np.float32))}


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the checkpoint and of the arrays")
    parser.add_argument("--gigabytes", type=float, default=1.25, help="size of the checkpoint (default 1.25)")
    parser.add_argument("--repeats", type=int, default=7, help="loads by each way (default 7)")
    parser.add_argument("--threads", type=int, help="that read (default: jaxmoe's choice)")
    parser.add_argument("--staging", action="store_true", help="load through staging memory, as for a GPU")
    parser.add_argument(
        "--format", nargs="*", choices=sorted(FORMATS), metavar="NAME", help="quantized formats (all that are known)"
    )
    parser.add_argument("--small", action="store_true", help="measure the work for each of many small experts")
    parser.add_argument("--orbax", action="store_true", help="compare with the same checkpoint as Orbax arrays")
    parser.add_argument("--directory", help="where to write the checkpoint (default: the system's temporary directory)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    # An exit by signal has to pass through the `with` below like any other.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    simulate_devices(8)
    if args.orbax:
        run_restores(args)
        return
    if args.small:
        small_experts.run_small(args.format, args.repeats, args.threads, args.directory, as_json=args.json)
        return
    if args.format is not None:
        run_formats(args)
        return
    with tempfile.TemporaryDirectory(prefix="jaxmoe-bench-", dir=args.directory) as directory:
        layers = write_checkpoint(Path(directory), args.dtype, int(args.gigabytes * 1e9))
        result = measure(Path(directory), args, layers)
    print(json.dumps(result) if args.json else as_text(result))


def layer_tensors(layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer, and of the embedding with the first."""
    names = MLP_EXPERTS.for_layer(layer)
    if layer == 0:
        yield "model.embed_tokens.weight", (VOCAB, MODEL)
    yield f"model.layers.{layer}.mlp.gate.weight", (EXPERTS, MODEL)
    for expert in range(EXPERTS):
        gate, up, down = names.per_expert(expert)
        yield from ((gate, (WIDTH, MODEL)), (up, (WIDTH, MODEL)), (down, (MODEL, WIDTH)))


def write_checkpoint(directory: Path, dtype_name: str, nbytes: int) -> int:
    """Write a checkpoint of at least `nbytes` bytes, one file per layer; returns the number of layers."""
    label, dtype = DTYPES[dtype_name]
    values = np.random.default_rng(0).standard_normal(VOCAB * MODEL, np.float32).astype(dtype).view(np.uint8)
    weight_map: dict[str, str] = {}
    written = layer = 0
    while written < nbytes:
        file = f"model-{layer + 1:05d}.safetensors"
        header, end = {}, 0
        for name, shape in layer_tensors(layer):
            begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
            header[name] = {"dtype": label, "shape": shape, "data_offsets": [begin, end]}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for position, entry in enumerate(header.values()):
                begin, stop = entry["data_offsets"]
                # Another start in the random values for each tensor, so that a mix-up of tensors would show.
                start = position * 4096 * dtype.itemsize if stop - begin < values.size // 2 else 0
                out.write(values[start : start + stop - begin])
        written += end
        layer += 1
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return layer


def load_with_jaxmoe(
    directory: Path, mesh: Mesh, layers: int, dtype: np.dtype, **options: int | bool | None
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Headers, plan and load: all that `jaxmoe.load` does about weights."""

    def spec(path: str, shape: tuple[int, ...], *dims: str | None, stack: bool = False) -> ParamSpec:
        sharding = NamedSharding(mesh, PartitionSpec(*dims))
        rows = {"rows": tuple(range(EXPERTS)), "source_groups": EXPERTS} if stack else {}
        return ParamSpec(path=path, shape=shape, dtype=dtype, sharding=sharding, **rows)

    checkpoint = open_checkpoint(directory)
    specs = [spec("embed", (VOCAB, MODEL), "tp", None)]
    blocks: list[Block] = whole_tensor_blocks(specs[0], "model.embed_tokens.weight")
    for layer in range(layers):
        router = spec(f"layers.{layer}.router", (EXPERTS, MODEL))
        gate_up = spec(f"layers.{layer}.w_gate_up", (EXPERTS, 2, WIDTH, MODEL), "ep", None, "tp", None, stack=True)
        down = spec(f"layers.{layer}.w_down", (EXPERTS, MODEL, WIDTH), "ep", None, "tp", stack=True)
        specs += [router, gate_up, down]
        blocks += whole_tensor_blocks(router, f"model.layers.{layer}.mlp.gate.weight")
        blocks += expert_blocks(gate_up, down, MLP_EXPERTS.for_layer(layer), checkpoint.tensors)
    arrays, report = load_arrays(make_load_plan(checkpoint, specs, blocks), **options)
    jax.block_until_ready(arrays)
    assert report.bytes_read == report.bytes_needed == checkpoint.nbytes
    return arrays, report


def load_with_safetensors(directory: Path) -> dict[str, jax.Array]:
    """What people do today: every tensor whole, experts dealt out to the devices."""
    from safetensors.flax import load_file

    devices, arrays = jax.devices(), {}
    for file in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            parts = name.split(".")
            expert = int(parts[5]) if "experts" in parts else 0
            arrays[name] = jax.device_put(tensor, devices[expert * len(devices) // EXPERTS])
    return jax.block_until_ready(arrays)


def read_only(directory: Path, threads: int, memory: list[np.ndarray]) -> None:
    """Read every file into its array of `memory`, in pieces, and do nothing else."""
    piece = 4 * 2**20
    files = sorted(directory.glob("*.safetensors"))
    descriptors = [os.open(file, os.O_RDONLY) for file in files]

    def read(item: tuple[int, int]) -> None:
        file, offset = item
        os.preadv(descriptors[file], [memory[file][offset : offset + piece].data], offset)

    pieces = [(file, offset) for file, array in enumerate(memory) for offset in range(0, array.size, piece)]
    run_in_threads(read, pieces, threads)
    for descriptor in descriptors:
        os.close(descriptor)


def measure(directory: Path, args: argparse.Namespace, layers: int) -> dict:
    """Time each way `args.repeats` times, taking turns."""
    mesh = make_mesh(dp=2, tp=2, ep=2)
    threads = args.threads or min(8, os.cpu_count() or 2)
    options = {"threads": args.threads, "staging": args.staging}
    dtype = DTYPES[args.dtype][1]
    sizes = [file.stat().st_size for file in sorted(directory.glob("*.safetensors"))]
    used = [np.ones(size, np.uint8) for size in sizes]
    check_alike(load_with_jaxmoe(directory, mesh, layers, dtype, **options)[0], load_with_safetensors(directory))
    ways: dict[str, Callable[[], object]] = {
        "jaxmoe": lambda: load_with_jaxmoe(directory, mesh, layers, dtype, **options),
        "safetensors.flax + device_put": lambda: load_with_safetensors(directory),
        "read only, memory in use": lambda: read_only(directory, threads, used),
        "read only, fresh memory": lambda: read_only(
            directory, threads, [aligned_array((size,), np.dtype(np.uint8)) for size in sizes]
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            loaded = way()
            seconds[name].append(time.perf_counter() - start)
            del loaded
    total = sum(sizes)
    rates = {name: total / statistics.median(times) / 1e9 for name, times in seconds.items()}
    return {
        "bytes": total,
        "dtype": args.dtype,
        "jax": jax.__version__,
        "cores": os.cpu_count(),
        "threads": threads,
        "staging": args.staging,
        "repeats": args.repeats,
        "gigabytes_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "best_gigabytes_per_second": {name: round(total / min(times) / 1e9, 2) for name, times in seconds.items()},
        "ratio": round(rates["jaxmoe"] / rates["safetensors.flax + device_put"], 2),
    }


def run_restores(args: argparse.Namespace) -> None:
    """Compare a checkpoint with the same as Orbax arrays; one JSON object, or a table."""
    case = next((name for name, (form, _) in CASES.items() if form.name in (args.format or ())), None)
    with tempfile.TemporaryDirectory(prefix="jaxmoe-bench-", dir=args.directory) as directory:
        original = Path(directory) / "original"
        original.mkdir()
        write_in_format(original, case or "fp8_block", int(args.gigabytes * 1e9), plain=case is None)
        result = restores.compare_restores(original, Path(directory), make_mesh(dp=2, tp=2, ep=2), args.repeats)
    print(json.dumps(result) if args.json else restores.as_text(result))


# --- quantized formats


def run_formats(args: argparse.Namespace) -> None:
    """Measure the formats that were asked for, or all; a line for each as it is done, or one JSON object."""
    results: dict[str, dict] = {}
    loaded = set()
    for name, (form, more) in CASES.items():
        if form.name not in (args.format or FORMATS):
            continue
        weight, arrays = make_weight(form, more, (2048, 4096))
        rates = {dtype: decode_rate(weight, arrays, DTYPES[dtype][1], seconds=0.5) / 1e9 for dtype in DTYPES}
        results[name] = {"decoded_gigabytes_per_core_second": {dtype: round(rate, 2) for dtype, rate in rates.items()}}
        line = f"{name:36}" + "".join(f" {dtype} {rate:5.2f}" for dtype, rate in rates.items())
        if form.name not in loaded and args.gigabytes:
            loaded.add(form.name)
            with tempfile.TemporaryDirectory(prefix="jaxmoe-bench-", dir=args.directory) as directory:
                results[name]["load"] = load = compare_loads(Path(directory), name, args)
            way, rate = "kept packed" if load["packed"] else "decoded", load["gigabytes_per_second"]
            line += (
                f" | {way:11} {load['bytes']['quantized'] / 1e9:.2f} GB: {rate['quantized']:5.2f} GB/s, plain "
                f"{rate['plain']:5.2f}; ratio {load['ratio']:.2f}, of the best {load['ratio_of_best']:.2f}"
            )
        if not args.json:
            print(line, flush=True)
    if args.json:
        print(json.dumps(results))


def compare_loads(directory: Path, case: str, args: argparse.Namespace) -> dict:
    """Load a checkpoint in a format and a plain one `args.repeats` times in turns, on the mesh."""
    mesh = make_mesh(dp=2, tp=2, ep=2)
    sizes, packed = {}, False
    for kind in ("quantized", "plain"):
        (directory / kind).mkdir()
        sizes[kind] = write_in_format(directory / kind, case, int(args.gigabytes * 1e9), plain=kind == "plain")
    rates: dict[str, list[float]] = {kind: [] for kind in sizes}
    for turn in range(args.repeats + 1):
        for kind, size in sizes.items():
            start = time.perf_counter()
            packings = load_as_is(directory / kind, mesh, threads=args.threads, staging=args.staging)
            if turn:  # the first warms up
                rates[kind].append(size / (time.perf_counter() - start) / 1e9)
            packed |= packings > 0
    ours, plain = rates["quantized"], rates["plain"]
    return {
        "packed": packed,
        "bytes": sizes,
        "gigabytes_per_second": {kind: round(statistics.median(found), 2) for kind, found in rates.items()},
        "best_gigabytes_per_second": {kind: round(max(found), 2) for kind, found in rates.items()},
        "ratio": round(statistics.median(a / b for a, b in zip(ours, plain, strict=True)), 2),
        "ratio_of_best": round(max(ours) / max(plain), 2),
    }


def load_as_is(directory: Path, mesh: Mesh, **options: int | bool | None) -> int:
    """Headers, plan and load as `jaxmoe.load` has them, weights kept packed; gives the number of packed parameters."""
    found = FamilyCheckpoint.open(directory)
    model = Decoder(found.config, mesh=mesh, dtype=DTYPES["bfloat16"][1])
    mapped = found.onto({spec.path: spec for spec in param_specs(model)})
    packings = pack_model(model, mapped).packings
    arrays, _ = load_arrays(plan_packed(mapped, packings), **options)
    jax.block_until_ready(arrays)
    return len(packings)


def check_alike(ours: dict[str, jax.Array], theirs: dict[str, jax.Array]) -> None:
    """A load that is quick and wrong is not measured."""
    for layer, expert in ((0, 0), (0, EXPERTS - 1), (1, EXPERTS // 2)):
        gate, up, down = (np.asarray(theirs[name]) for name in MLP_EXPERTS.for_layer(layer).per_expert(expert))
        gate_up = np.asarray(ours[f"layers.{layer}.w_gate_up"][expert])
        np.testing.assert_array_equal(gate_up, np.stack([gate, up]))
        np.testing.assert_array_equal(np.asarray(ours[f"layers.{layer}.w_down"][expert]), down)


def as_text(result: dict) -> str:
    """The result for people."""
    lines = [
        f"{result['bytes'] / 1e9:.2f} GB of {result['dtype']}, jax {result['jax']}, {result['cores']} cores, "
        f"{result['threads']} threads, {result['repeats']} repeats in turns; GB/s, median (best)"
    ]
    for name, rate in result["gigabytes_per_second"].items():
        lines.append(f"  {name:32s} {rate:6.2f} ({result['best_gigabytes_per_second'][name]:.2f})")
    lines.append(f"  jaxmoe is {result['ratio']} times as fast as safetensors.flax + device_put")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
