#!/usr/bin/env python3
"""Does the model of time put meshes in the order in which they are measured?

It takes small MoE models with random weights, in each of which something else takes the time, on 8 simulated CPU devices;
times a decode step and the prefill of every layout that `jaxmoe plan --devices 8` tries, in turns, by the programs that
`jaxmoe.generate` runs; and models the same for a device whose rates are measured in the same run: a copy, a product and
all-reduces, with all devices at work, for they share the cores. For each case it prints both times, the rank correlations
and the layouts that differ clearly and that the model has in the other order.

The clock is the processor's, of all threads, which other programs on the machine disturb least: its times, and the rates by
it, are to be compared with each other alone.

    python scripts/check_ranking.py
    python scripts/check_ranking.py --cases cache --clock wall --rounds 9
    python scripts/check_ranking.py --json ranking.json
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table
from scipy import stats

import jaxmoe
from jaxmoe.checkpoint.mapping import abstract_model
from jaxmoe.cli.options import count
from jaxmoe.config import DecoderConfig
from jaxmoe.dispatch import explain_dispatch
from jaxmoe.hardware import GPU
from jaxmoe.layers import dispatch_shape
from jaxmoe.models import read_model_config
from jaxmoe.planning import StepTime, step_time
from jaxmoe.planning.roofline import Phase
from jaxmoe.planning.search import describe_layout, layouts
from scripts._bench.options import new_file
from scripts._bench.report import machine, warn_if_busy, write_json
from scripts._bench.simulated import CLOCKS, measure_device, step_turns
from scripts._bench.timing import take_turns

DEVICES = 8
_CORRELATIONS = {"spearman": stats.spearmanr, "kendall": stats.kendalltau}
PHASES: tuple[Phase, ...] = ("decode", "prefill")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a batch.

    Attributes:
        sizes: entries of a config.json in place of Qwen3-30B-A3B's.
        batch_size: sequences.
        prompt_length: tokens of each in the prefill.
        max_length: tokens of each that the cache is for.
    """

    sizes: dict[str, int]
    batch_size: int
    prompt_length: int
    max_length: int


def _sizes(width: int, vocab: int, experts: int, expert_width: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "num_hidden_layers": 1,
        "hidden_size": width,
        "vocab_size": vocab,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": expert_width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 32,
    }


CASES = {
    "experts": Case(_sizes(512, 1024, 8, 1024, 8, 8) | {"num_experts_per_tok": 1}, 32, 16, 32),
    "dense": Case(_sizes(256, 24576, 8, 32, 8, 8), 16, 64, 128),
    "cache": Case(_sizes(128, 512, 8, 32, 16, 2), 8, 384, 4096),
    "exchange": Case(_sizes(1024, 512, 8, 16, 8, 8), 16, 256, 256),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure and model, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parser.add_argument("--clock", choices=list(CLOCKS), default="processor", help="what is measured (processor)")
    parser.add_argument("--rounds", type=count, default=5, help="turns of each layout, of which the fastest counts (5)")
    parser.add_argument("--factor", type=float, default=1.5, help="ratio of times that differ clearly (1.5)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write everything there")
    args = parser.parse_args(argv)
    jaxmoe.simulate_devices(DEVICES)
    here, results, console = machine(jax.devices()[0]), [], Console(width=None if sys.stdout.isatty() else 120)
    warn_if_busy(here)
    for name in args.cases:
        results.append(check(name, CASES[name], args))
        show(console, results[-1])
        if args.json:
            write_json(args.json, {"machine": here, "clock": args.clock, "cases": results})


def check(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Measure and model all layouts of a case."""
    config, turns, left_out = read_config(case.sizes), {}, {}
    batch = {"batch_size": case.batch_size, "prompt_length": case.prompt_length, "max_length": case.max_length}
    tried = {describe_layout(*layout): layout for layout in layouts(DEVICES)}
    for text, layout in tried.items():
        try:
            turns |= {(text, phase): turn for phase, turn in step_turns(config, *layout, **batch).items()}
        except ValueError as error:
            left_out[text] = str(error)
    device = measure_device(DEVICES, args.clock)
    taken = take_turns(turns, rounds=args.rounds, budget_s=60, clock=CLOCKS[args.clock])
    modeled = {text: modeled_steps(config, *tried[text], case, device) for text in tried if text not in left_out}
    steps = {}
    for phase in PHASES:
        measured = {text: min(taken[text, phase]) for text in modeled}
        seconds = {text: both[phase].seconds for text, both in modeled.items()}
        turned, clear = turned_round(measured, seconds, args.factor)
        steps[phase] = {
            "measured": measured,
            "modeled": {text: both[phase].terms() for text, both in modeled.items()},
            **correlations(measured, seconds),
            "clear_pairs": clear,
            "turned_round": turned,
        }
    rates = {"memory_bandwidth": device.memory_bandwidth, "flops": device.flops, **dataclasses.asdict(device.links)}
    return {"case": name, **dataclasses.asdict(case), "rates": rates, "left_out": left_out, "steps": steps}


def correlations(measured: Mapping[str, float], modeled: Mapping[str, float]) -> dict[str, float]:
    """Rank correlations of two values of each thing, Spearman's and Kendall's tau-b."""
    pairs = [(value, modeled[name]) for name, value in measured.items()]
    return {name: float(call(*zip(*pairs, strict=True)).statistic) for name, call in _CORRELATIONS.items()}


def turned_round(
    measured: Mapping[str, float], modeled: Mapping[str, float], factor: float
) -> tuple[list[tuple[str, str]], int]:
    """Find the pairs that the model has in the other order, of those whose measured values clearly differ.

    Args:
        measured: value of each thing.
        modeled: value of each by the model.
        factor: least ratio of two measured values that differ clearly.

    Returns:
        Pairs (smaller, larger) by measurement of which the model has the larger no larger, and the number of pairs that
        differ clearly.
    """
    clear = [pair for pair in itertools.permutations(measured, 2) if measured[pair[1]] >= factor * measured[pair[0]]]
    return [(small, large) for small, large in clear if modeled[large] <= modeled[small]], len(clear)


def read_config(sizes: dict[str, int]) -> DecoderConfig:
    """Qwen3-30B-A3B's config with other sizes."""
    raw = json.loads((ROOT / "docs" / "configs" / "Qwen3-30B-A3B" / "config.json").read_text()) | sizes
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw))
        return read_model_config(folder)[1]


def modeled_steps(
    config: DecoderConfig, sizes: dict[str, int], expert_axes: tuple[str, ...], case: Case, device: GPU
) -> dict[Phase, StepTime]:
    """Model both steps by the dispatch that the devices take."""
    model = abstract_model(config, sizes=sizes, expert_axes=expert_axes, dtype=jnp.dtype("float32"))
    found: dict[Phase, StepTime] = {}
    for phase in PHASES:
        length = case.prompt_length if phase == "prefill" else case.max_length
        tokens = case.batch_size * (length if phase == "prefill" else 1)
        name = explain_dispatch(dispatch_shape(model.layers[0].moe, tokens), "cpu").name
        found[phase] = step_time(model, phase, batch_size=case.batch_size, length=length, gpu=device, dispatch=name)
    return found


def show(console: Console, result: dict[str, Any]) -> None:
    """Print a table of a case, and what the model has in the other order."""
    rates = result["rates"]
    console.print(
        f"{result['case']}: one of {DEVICES} devices copies {rates['memory_bandwidth'] / 1e9:.2f} GB/s, multiplies "
        f"{rates['flops'] / 1e9:.1f} GFLOP/s, sends {rates['within'] / 1e9:.2f} GB/s, waits {rates['latency'] * 1e6:.0f} us",
        highlight=False,
    )
    for phase, step in result["steps"].items():
        table = Table(title=f"{result['case']}, {phase}", title_justify="left")
        table.add_column("layout")
        for name in ("measured ms", "modeled ms", "modeled, most in"):
            table.add_column(name, justify="right", no_wrap=True)
        for text, seconds in sorted(step["measured"].items(), key=lambda item: item[1]):
            terms = step["modeled"][text]
            most = " ".join(f"{part} {value * 1e3:.2f}" for part, value in list(terms.items())[:2])
            table.add_row(text, f"{seconds * 1e3:.2f}", f"{sum(terms.values()) * 1e3:.2f}", most)
        console.print(table)
        console.print(
            f"Spearman {step['spearman']:.2f}, Kendall {step['kendall']:.2f}; of {step['clear_pairs']} pairs that clearly "
            f"differ the model has {len(step['turned_round'])} in the other order",
            highlight=False,
        )
        for small, large in step["turned_round"]:
            console.print(f"  {small} is faster than {large}", highlight=False)


if __name__ == "__main__":
    main()
