"""Processor time of a load whose experts are many and small, where work for each tensor counts and bytes do not."""

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint import load_arrays
from jaxmoe.checkpoint.loading import plan_packed
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, pack_model
from jaxmoe.layers import param_specs
from jaxmoe.mesh import make_mesh
from jaxmoe.models import Decoder
from scripts._bench.formats import CASES, write_checkpoint

# One variant of each format that stays packed, an expert's matrices tensors of their own.
FORMATS = {
    CASES[case][0].name: case
    for case in (
        "fp8_block",
        "fp8_tensor",
        "fp8_channel",
        "int_quantized",
        "pack_quantized 4 bits",
        "nvfp4_pack",
        "mxfp4_pack",
        "gptq 4 bits",
        "awq",
        "nvfp4",
    )
}
LAYERS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "num_experts": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
}
MESH = {"dp": 1, "tp": 1, "ep": 8}
STEPS = ("headers", "model", "mapping", "packing", "plan", "reading")


def run_small(
    formats: Sequence[str] | None, repeats: int, threads: int | None, scratch: str | None, *, as_json: bool
) -> None:
    """Measure the formats that were asked for, or all of `FORMATS`; a line for each as it is done, or one JSON object."""
    results: dict[str, dict] = {}
    for name in formats or FORMATS:
        if name not in FORMATS:
            raise SystemExit(f"--small takes formats that stay packed, {', '.join(FORMATS)}; got {name!r}")
        with tempfile.TemporaryDirectory(prefix="jaxmoe-bench-", dir=scratch) as directory:
            results[name] = measure_small(Path(directory), FORMATS[name], repeats, threads)
        if not as_json:
            print(as_text(name, results[name]), flush=True)
    if as_json:
        print(json.dumps(results))


def measure_small(directory: Path, case: str, repeats: int, threads: int | None) -> dict:
    """Load a checkpoint in a format `repeats` times onto the mesh, its weights kept packed.

    Args:
        directory: directory that is there, and empty.
        case: name in `scripts._bench.formats.CASES` of the format of its experts.
        repeats: number of loads; one more warms up.
        threads: number of threads that read, None for jaxmoe's choice.

    Returns:
        Counts of quantized weights, and of the reads and bytes that they and the rest took; and medians of the processor's
        milliseconds, in all and in each step, and of its microseconds for each weight.
    """
    write_checkpoint(directory, case, sizes=SIZES, layers=LAYERS)
    found = [timed_load(directory, threads) for _ in range(repeats + 1)][1:]
    counts = found[0][1]
    total = statistics.median(sum(seconds.values()) for seconds, _ in found)
    return {
        **counts,
        "milliseconds": round(total * 1e3, 1),
        "microseconds_per_weight": round(total * 1e6 / counts["weights"], 1),
        "steps": {step: round(statistics.median(one[step] for one, _ in found) * 1e3, 1) for step in STEPS},
    }


def timed_load(directory: Path, threads: int | None) -> tuple[dict[str, float], dict[str, int]]:
    """What `jaxmoe.load` does about weights: the processor's seconds of each of `STEPS`, and what was loaded."""
    ticks = [time.process_time()]

    def tick() -> None:
        ticks.append(time.process_time())

    found = FamilyCheckpoint.open(directory)
    tick()
    model = Decoder(found.config, mesh=make_mesh(**MESH), dtype=jnp.bfloat16)
    specs = {spec.path: spec for spec in param_specs(model)}
    tick()
    mapped = found.onto(specs)
    tick()
    packings = pack_model(model, mapped).packings
    tick()
    plan = plan_packed(mapped, packings)
    tick()
    arrays, report = load_arrays(plan, threads=threads)
    jax.block_until_ready(arrays)
    tick()
    assert report.bytes_read == report.bytes_needed
    assert packings, "no weight stays packed"
    counts = {
        "reads": len(plan.reads),
        "weights": sum(found.formats.values()),
        "bytes": report.bytes_read,
    }
    return dict(zip(STEPS, np.diff(ticks).tolist(), strict=True)), counts


def as_text(name: str, result: dict) -> str:
    """The result as a line."""
    steps = ", ".join(f"{step} {milliseconds:.0f}" for step, milliseconds in result["steps"].items())
    return (
        f"{name:14} {result['weights']} weights, {result['reads']} reads, {result['bytes'] / 1e6:.0f} MB: "
        f"{result['milliseconds']:5.0f} ms ({steps}), {result['microseconds_per_weight']:.0f} us a weight"
    )
