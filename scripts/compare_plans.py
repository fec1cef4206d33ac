#!/usr/bin/env python3
"""How far is what `jaxmoe plan` counts from what XLA's compiler says that a step takes, for published models?

It plans each model, compiles prefill and a decode step for GPUs that are not here, of layers that repeat two repetitions,
and prints a line of docs/reference/plan_and_compiler.md, where --write puts it. It ends with 1 where the arguments of a
program are 2 % or more off the plan's weights and cache, or all of its memory 10 % or more off the plan's sum. It needs
jax's compiler for GPUs (the extra "aot"), and half a minute to three of processor time for each model.

    JAX_PLATFORMS=cpu python scripts/compare_plans.py
    JAX_PLATFORMS=cpu python scripts/compare_plans.py gpt-oss-20b mixtral-8x7b --write
    JAX_PLATFORMS=cpu python scripts/compare_plans.py mixtral-8x7b --layers 8 --every-layer
"""

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jaxmoe
from jaxmoe.mesh import write_mesh
from jaxmoe.planning import compile_few_layers
from jaxmoe.planning.few_layers import CountedStep
from jaxmoe.planning.memory import Plan
from tests.support.published import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_FP8,
    GPT_OSS_120B_MXFP4,
    KIMI_K2_FP8,
    MIXTRAL_8X7B,
    MIXTRAL_8X22B,
    QWEN3_30B,
    QWEN3_235B,
    first_layers,
)

PAGE = ROOT / "docs" / "reference" / "plan_and_compiler.md"
BEGIN, END = "<!-- by scripts/compare_plans.py -->\n", "<!-- end -->\n"
SIZES = {"batch_size": 8, "prompt_length": 1024, "max_length": 2048}
_DENSE_3 = {"num_hidden_layers": 61, "first_k_dense_replace": 3}
_HEAD = (
    "| model | GPUs | mesh | layers compiled | weights and cache, GB | prefill takes | decode takes | plan's step, GB | "
    "prefill's temporaries, GB | prefill in all | decode in all |\n" + "|---" * 11 + "|\n"
)
ARGUMENTS, ALL = 0.02, 0.1


class Case(NamedTuple):
    """A published model on GPUs, and the mesh of them."""

    config: Mapping[str, Any]
    chip: str
    mesh: dict[str, int]


CASES = {
    "mixtral-8x7b": Case(MIXTRAL_8X7B | {"num_hidden_layers": 32}, "h100", {"tp": 2, "ep": 4}),
    "mixtral-8x22b": Case(MIXTRAL_8X22B | {"num_hidden_layers": 56}, "h100", {"tp": 2, "ep": 4}),
    "qwen3-30b-a3b": Case(QWEN3_30B | {"num_hidden_layers": 48}, "h100", {"ep": 8}),
    "qwen3-235b-a22b": Case(QWEN3_235B | {"num_hidden_layers": 94}, "h100", {"tp": 2, "ep": 4}),
    "gpt-oss-20b": Case(GPT_OSS_120B_MXFP4 | {"num_hidden_layers": 24, "num_local_experts": 32}, "h100", {"ep": 2}),
    "gpt-oss-120b": Case(GPT_OSS_120B_MXFP4 | {"num_hidden_layers": 36}, "h100", {"tp": 2, "ep": 4}),
    "deepseek-v3, fp8": Case(DEEPSEEK_V3_FP8 | _DENSE_3, "h200", {"ep": 8}),
    "deepseek-v3, bf16": Case(DEEPSEEK_V3 | _DENSE_3, "h200", {"ep": 8}),
    "deepseek-v3, fp8, 4 nodes": Case(DEEPSEEK_V3_FP8 | _DENSE_3, "h100", {"tp": 4, "ep": 8}),
    "deepseek-v3, bf16, 4 nodes": Case(DEEPSEEK_V3 | _DENSE_3, "h100", {"tp": 4, "ep": 8}),
    "kimi-k2, fp8": Case(KIMI_K2_FP8 | {"num_hidden_layers": 61}, "h200", {"ep": 8}),
    "kimi-k2, fp8, 4 nodes": Case(KIMI_K2_FP8 | {"num_hidden_layers": 61}, "h100", {"tp": 4, "ep": 8}),
}


def main() -> None:
    """Parse the command line, compare, print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="MODEL", help=f"some of {', '.join(CASES)} (default: all)")
    parser.add_argument("--layers", type=int, metavar="N", help="take the first N layers of each for the model")
    parser.add_argument("--every-layer", action="store_true", help="compile all layers, which takes an hour for some")
    parser.add_argument("--write", action="store_true", help=f"put the lines into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"models are {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    if args.write and (args.every_layer or args.layers):
        parser.error(
            "the page is of whole models and few compiled layers; leave --layers and --every-layer out, or --write"
        )
    off = []
    for name in args.cases or CASES:
        before = os.times()
        case = CASES[name]
        if args.layers:
            case = case._replace(config=first_layers(dict(case.config), args.layers))
        planned, steps = compare(case, every_layer=args.every_layer)
        line = write_line(name, case, planned, steps)
        seconds = sum(os.times()[:4]) - sum(before[:4])
        print(f"{line}{seconds:.0f} s of processor time; {describe(steps)}", flush=True)
        if any(abs(first) >= ARGUMENTS or abs(second) >= ALL for first, second in differences(planned, steps).values()):
            off.append(name)
        if args.write:
            put(name, line)
    if off:
        sys.exit(f"off by more than {ARGUMENTS:.0%} of the arguments or {ALL:.0%} of all: {', '.join(off)}")


def compare(case: Case, *, every_layer: bool = False) -> tuple[Plan, dict[str, CountedStep]]:
    """The plan of a case, and its compiled steps."""
    count = math.prod(case.mesh.values())
    mesh = jaxmoe.make_mesh(**case.mesh, devices=list(jaxmoe.gpu_topology(case.chip, count, hosts=-(-count // 8))))
    with config_file(case) as path:
        return plan_of(case), compile_few_layers(path, mesh, **SIZES, every_layer=every_layer)


def plan_of(case: Case) -> Plan:
    """The plan of a case."""
    with config_file(case) as path:
        return jaxmoe.plan(path, **case.mesh, **SIZES, dtype="bfloat16", device=case.chip)


@contextlib.contextmanager
def config_file(case: Case) -> Iterator[Path]:
    """A directory with the config of a case."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(case.config))
        yield Path(directory)


def differences(planned: Plan, steps: dict[str, CountedStep]) -> dict[str, tuple[float, float]]:
    """{step: arguments over the plan's weights and cache, and all over the plan's sum for that step}."""
    return {
        name: (
            step.argument_bytes / planned.held_bytes - 1,
            (step.argument_bytes + step.temp_bytes) / (planned.held_bytes + planned.step_bytes[name]) - 1,
        )
        for name, step in steps.items()
    }


def write_line(name: str, case: Case, planned: Plan, steps: dict[str, CountedStep]) -> str:
    """A line of the table in Markdown."""
    off, prefill = differences(planned, steps), steps["prefill"]
    cells = [
        name,
        f"{math.prod(case.mesh.values())} {case.chip}",
        write_mesh(case.mesh),
        f"{' and '.join(map(str, prefill.compiled))} of {prefill.layers}",
        f"{planned.held_bytes / 1e9:.2f}",
        *[f"{off[step][0]:+.3%}" for step in ("prefill", "decode")],
        f"{planned.step_bytes['prefill'] / 1e9:.3f}",
        f"{prefill.temp_bytes / 1e9:.3f}",
        *[f"{off[step][1]:+.1%}" for step in ("prefill", "decode")],
    ]
    return f"| {' | '.join(cells)} |\n"


def describe(steps: dict[str, CountedStep]) -> str:
    """The bytes of both steps."""
    return "; ".join(
        f"{name}: {step.argument_bytes:,} bytes of arguments, {step.temp_bytes:,} besides, {step.wire_bytes:,.0f} sent"
        for name, step in steps.items()
    )


def put(name: str, line: str) -> None:
    """Put a line into the page, in the place of the one that the model has there."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    table, _, behind = rest.partition(END)
    lines = {each.split("|")[1].strip(): each for each in table.splitlines(keepends=True)[2:]} | {name: line}
    rows = "".join([lines[case] for case in CASES if case in lines])
    PAGE.write_text(f"{before}{BEGIN}{_HEAD}{rows}{END}{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
