"""Times jaxmoe against transformers on the CPU: prefill of 512 tokens, decode at batch 1, decode at batch 8.

The model is a Qwen3-MoE of 300 M random float32 weights, made on the spot by transformers in a temporary folder. Every
side is a process of its own, loaded once. The sides take turns, one working while all others wait, round after round,
and the medians over the rounds are compared. transformers runs with its defaults for threads, grouped_mm experts and
sdpa attention, under inference_mode in a bare loop of forward passes, with a dynamic and with a static cache; jaxmoe
runs on several simulated meshes. The fastest of each is what the ratio is made of. Where an aim is missed, what limits it
is computed from the same run.

    scripts/test --parity --collect-only -q                                  # makes an environment with transformers
    .venv/py3.11-parity/bin/python scripts/bench_generate.py
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts._bench.worker import Worker, say, warn_if_busy

MODEL = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1024,
    "moe_intermediate_size": 384,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
# Behind the mesh, the axes that share the experts, where those are not the default ("ep",).
MESHES = ["dp=1,tp=1,ep=1", "dp=1,tp=2,ep=1", "dp=1,tp=4,ep=1", "dp=1,tp=4,ep=1 experts=ep,tp", "dp=1,tp=1,ep=4"]

# What is timed: sequences, tokens of each prompt, tokens generated. The first token comes out of prefill, so decode
# is the time of the tokens after it.
TASKS = {
    "prefill": {"batch": 1, "prompt": 512, "new": 1, "aim": 1.0},
    "decode batch 1": {"batch": 1, "prompt": 32, "new": 65, "aim": 2.0},
    "decode batch 8": {"batch": 8, "prompt": 32, "new": 33, "aim": 1.0},
}


def main() -> None:
    """Makes the checkpoint, starts the sides, gives them their turns, prints what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--mesh", action="append", help=f"simulated meshes to try (default: {' '.join(MESHES)})")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "CHECKPOINT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(*args.worker)
        return

    cpus = os.cpu_count()
    warn_if_busy()
    with tempfile.TemporaryDirectory() as folder:
        say("making the checkpoint")
        subprocess.run([sys.executable, __file__, "--worker", "make", folder], check=True, stdout=sys.stderr)
        sides = {}
        try:
            for kind in ["dynamic cache", "static cache", *(args.mesh or MESHES)]:
                say(f"starting {side_name(kind)}")
                sides[side_name(kind)] = Worker(__file__, "--worker", kind, folder)
            seconds = take_turns(sides, args.rounds)
        finally:
            for side in sides.values():
                side.close()
    tasks, bandwidth = compare(seconds), read_bandwidth()
    report = {
        "cpus": cpus,
        "python": platform.python_version(),
        "read_bytes_per_second": bandwidth,
        "tasks": tasks,
        "limits": limits(tasks, bandwidth),
    }
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


def side_name(kind: str) -> str:
    """How a side is called in the tables."""
    return f"jaxmoe {kind}" if "=" in kind else f"transformers, {kind}"


def take_turns(sides: dict[str, Worker], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by task and side; the round before the first is warm-up and compiles."""
    seconds = {task: {name: [] for name in sides} for task in TASKS}
    for task in TASKS:
        for turn in range(rounds + 1):
            say(f"{task}: " + (f"round {turn} of {rounds}" if turn else "warm-up"))
            for name, side in sides.items():
                taken = side.turn(task)
                if turn:
                    seconds[task][name].append(taken)
    return seconds


def compare(seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """By task: median tokens a second of every side, the best of both, and their ratio."""
    results = {}
    for task, by_side in seconds.items():
        size = TASKS[task]
        tokens = size["batch"] * (size["prompt"] if size["new"] == 1 else size["new"] - 1)
        rates = {name: tokens / statistics.median(times) for name, times in by_side.items()}
        jaxmoe = max((name for name in rates if name.startswith("jaxmoe")), key=rates.__getitem__)
        theirs = max((name for name in rates if not name.startswith("jaxmoe")), key=rates.__getitem__)
        results[task] = {
            "tokens_per_second": rates,
            "best": {"jaxmoe": jaxmoe, "transformers": theirs},
            "ratio": rates[jaxmoe] / rates[theirs],
            "aim": size["aim"],
            "seconds": by_side,
        }
    return results


def read_bandwidth() -> float:
    """Bytes per second at which all cores together read memory: torch's sum over a gigabyte, the best of five."""
    import torch

    values = torch.ones(2**28)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return values.nbytes / min(seconds)


def weights_per_step(batch: int) -> float:
    """Bytes of float32 weights that a decode step cannot but read: each expert that a token goes to, and all the rest."""
    m = MODEL
    heads = m["num_attention_heads"] + m["num_key_value_heads"]
    attention = 2 * heads * m["head_dim"] * m["hidden_size"]
    touched = m["num_experts"] * (1 - (1 - m["num_experts_per_tok"] / m["num_experts"]) ** batch)
    experts = touched * 3 * m["hidden_size"] * m["moe_intermediate_size"]
    return 4 * (m["num_hidden_layers"] * (attention + experts) + m["vocab_size"] * m["hidden_size"])


def limits(tasks: dict[str, Any], bandwidth: float) -> list[str]:
    """What stands in the way of each aim that was missed."""
    lines = []
    for name, result in tasks.items():
        if result["ratio"] >= result["aim"]:
            continue
        theirs = result["tokens_per_second"][result["best"]["transformers"]]
        task = TASKS[name]
        if task["new"] > 1:
            weights = weights_per_step(task["batch"])
            ours = result["tokens_per_second"][result["best"]["jaxmoe"]]
            lines.append(
                f"{name}: a step reads {weights / 1e6:.0f} MB of weights, which takes {weights / bandwidth * 1e3:.1f} ms at "
                f"the {bandwidth / 1e9:.0f} GB/s that a sum over memory reaches here; jaxmoe takes "
                f"{task['batch'] / ours * 1e3:.1f} ms, transformers {task['batch'] / theirs * 1e3:.1f} ms"
            )
        else:
            # The output projection is applied to the last token only.
            flops = 2 * (weights_per_step(1) / 4 - MODEL["vocab_size"] * MODEL["hidden_size"])
            ours = result["tokens_per_second"][result["best"]["jaxmoe"]]
            lines.append(
                f"{name}: {flops * ours / 1e9:.0f} GFLOP/s in products of tiles of rows with one expert's matrices, "
                f"where transformers reaches {flops * theirs / 1e9:.0f}"
            )
    return lines


def show(report: dict[str, Any]) -> None:
    """Prints the tables."""
    from rich.console import Console
    from rich.table import Table

    tasks = report["tasks"]
    table = Table(title=f"tokens/s, medians; {report['cpus']} CPUs, float32", title_justify="left")
    table.add_column("side")
    for task in tasks:
        table.add_column(task, justify="right")
    for name in next(iter(tasks.values()))["tokens_per_second"]:
        table.add_row(name, *(cell(result, name) for result in tasks.values()))
    table.add_section()
    table.add_row("ratio of the best", *(f"[bold]{result['ratio']:.2f}[/]" for result in tasks.values()))
    table.add_row("aim", *(f"{result['aim']:.1f}" for result in tasks.values()))
    console = Console(width=110)
    console.print(table)
    for line in report["limits"]:
        console.print(line, highlight=False)


def cell(result: dict[str, Any], name: str) -> str:
    """The tokens a second of one side, bold where they are what the ratio is made of."""
    rate = f"{result['tokens_per_second'][name]:.1f}"
    return f"[bold]{rate}[/]" if name in result["best"].values() else rate


def serve(kind: str, checkpoint: str) -> None:
    """A worker: loads the model, then answers every task on stdin with seconds on stdout."""
    if kind == "make":
        make_checkpoint(checkpoint)
        return
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints stays out of the answers
    timer = jaxmoe_timer(kind, checkpoint) if "=" in kind else transformers_timer(kind, checkpoint)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        task = TASKS[line.strip()]
        print(json.dumps(timer(prompts(task["batch"], task["prompt"]), task["new"])), file=answers, flush=True)


def prompts(batch: int, length: int) -> list[list[int]]:
    """The same random token ids for every side."""
    import numpy as np

    return np.random.default_rng(0).integers(0, MODEL["vocab_size"], (batch, length)).tolist()


def make_checkpoint(folder: str) -> None:
    """Random weights as transformers initializes and saves them."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).save_pretrained(folder)


Timer = Callable[[list[list[int]], int], float]


def transformers_timer(kind: str, checkpoint: str) -> Timer:
    """Seconds of prefill, or of the decode steps after it, in transformers."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    ).eval()

    @torch.inference_mode()
    def timer(prompts: list[list[int]], new: int) -> float:
        tokens = torch.tensor(prompts)
        length = tokens.shape[1] + new
        cache = DynamicCache(config=model.config)
        if kind == "static cache":
            cache = StaticCache(config=model.config, max_cache_len=length)
        start = time.perf_counter()
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        tokens = logits[:, -1:].argmax(-1)
        if new == 1:
            return time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(new - 1):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1:].argmax(-1)
        tokens.tolist()
        return time.perf_counter() - start

    return timer


def jaxmoe_timer(mesh: str, checkpoint: str) -> Timer:
    """Seconds of prefill, or of the decode steps after it, in jaxmoe on a simulated mesh."""
    import math

    import jaxmoe
    from jaxmoe import GenerationStats
    from jaxmoe.mesh import parse_mesh

    mesh, _, axes = mesh.partition(" experts=")
    sizes = parse_mesh(mesh)
    jaxmoe.simulate_devices(math.prod(sizes.values()))
    model = jaxmoe.load(checkpoint, mesh=jaxmoe.make_mesh(**sizes), expert_axes=tuple((axes or "ep").split(",")))

    def timer(prompts: list[list[int]], new: int) -> float:
        stats = GenerationStats()
        jaxmoe.generate(model, prompts, max_new_tokens=new, ignore_eos=True, stats=stats)
        return stats.prefill_seconds if new == 1 else stats.decode_seconds

    return timer


if __name__ == "__main__":
    main()
