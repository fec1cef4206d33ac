"""Times many prompts of mixed lengths on the CPU: continuous batching and one static batch, here and in transformers.

64 prompts, each with its own number of tokens to generate, both of skewed lengths, go through a Qwen3-MoE of 20 M random
float32 weights, made on the spot by transformers in a temporary folder. The sides are jaxmoe's `ContinuousEngine`, its
static batch (the loop of `jaxmoe.generate`, where a row that has ended is computed on but given no expert), transformers'
`generate` in padded batches of 8, 16 and 64, which end with their longest rows, and transformers' continuous batching. Every
side is a process of its own, loaded and warmed up once; they take turns, and medians over the rounds are compared. All sides
have to give as many tokens; the share that is the same as the first side's is printed.

    scripts/test --parity --collect-only -q                                  # makes an environment with transformers
    .venv/py3.11-parity/bin/python scripts/bench_batches.py
"""

import argparse
import json
import os
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
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "moe_intermediate_size": 192,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
COUNT, LONGEST = 64, 512
# Times as fast as each of these the continuous engine is to be.
AIMS = {"jaxmoe, static batch": 3.0, "transformers, continuous batching": 1.0, "transformers, generate": 2.0}
OURS = "jaxmoe, continuous batching"

Outputs = list[list[int]]


def main() -> None:
    """Makes the checkpoint, starts the sides, gives them their turns, prints what they took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--slots", type=int, default=16, help="slots of the continuous engine (default: 16)")
    parser.add_argument("--side", action="append", choices=[*SIDES], help="sides to time (default: all)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "CHECKPOINT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        serve(*args.worker, args.slots)
        return
    warn_if_busy()
    with tempfile.TemporaryDirectory() as folder:
        say("making the checkpoint")
        subprocess.run([sys.executable, __file__, "--worker", "make", folder], check=True, stdout=sys.stderr)
        sides: dict[str, Worker] = {}
        try:
            for name in args.side or SIDES:
                say(f"starting {name}")
                sides[name] = Worker(__file__, "--slots", str(args.slots), "--worker", name, folder)
            found = take_turns(sides, args.rounds)
        finally:
            for side in sides.values():
                side.close()
    report = compare(found)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report)


def take_turns(sides: dict[str, Worker], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Answers by side; the round before the first is warm-up and compiles."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            say(f"{name}: " + (f"round {turn} of {rounds}" if turn else "warm-up"))
            answer = side.turn("go")
            if turn:
                found[name].append(answer)
    return found


def compare(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """By side: seconds, tokens a second, and how many tokens are the first side's own."""
    _, new = workload()
    first = next(iter(found.values()))[0]["tokens"]
    results = {}
    for name, answers in found.items():
        tokens = answers[0]["tokens"]
        if [len(one) for one in tokens] != new:
            raise SystemExit(f"{name} gave {sum(map(len, tokens))} tokens where {sum(new)} were asked for")
        same = sum(
            a == b for ours, theirs in zip(tokens, first, strict=True) for a, b in zip(ours, theirs, strict=True)
        )
        seconds = [answer["seconds"] for answer in answers]
        results[name] = {
            "seconds": seconds,
            "median_seconds": statistics.median(seconds),
            "cpu_seconds": statistics.median(answer["cpu_seconds"] for answer in answers),
            "tokens_per_second": sum(new) / statistics.median(seconds),
            "same": same / sum(new),
        }
    ratios = {}
    for aim in AIMS if OURS in results else ():
        of = [result["median_seconds"] for name, result in results.items() if name.startswith(aim)]
        if of:
            ratios[aim] = min(of) / results[OURS]["median_seconds"]
    return {"cpus": os.cpu_count(), "prompts": COUNT, "new_tokens": sum(new), "sides": results, "ratios": ratios}


def show(report: dict[str, Any]) -> None:
    """Prints the tables."""
    print(f"{report['prompts']} prompts, {report['new_tokens']} tokens to generate; {report['cpus']} CPUs, float32")
    print(f"{'side':40}{'seconds':>10}{'CPU s':>10}{'tokens/s':>10}{'same':>8}")
    for name, result in report["sides"].items():
        print(
            f"{name:40}{result['median_seconds']:10.2f}{result['cpu_seconds']:10.2f}{result['tokens_per_second']:10.0f}"
            f"{result['same']:8.1%}"
        )
    for name, ratio in report["ratios"].items():
        print(f"{ratio:.2f} times as fast as {name} (aim: {AIMS[name]:.1f})")


def workload() -> tuple[list[list[int]], list[int]]:
    """Prompts, and the number of tokens to generate for each: most are short, few are long."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.0, 1.0, COUNT), 8, LONGEST).astype(int)
    new = np.clip(rng.lognormal(3.6, 1.0, COUNT), 4, LONGEST).astype(int)
    return [rng.integers(0, MODEL["vocab_size"], length).tolist() for length in lengths], new.tolist()


def serve(kind: str, checkpoint: str, slots: int) -> None:
    """A worker: loads the model, then answers every line on stdin with seconds and tokens on stdout."""
    if kind == "make":
        make_checkpoint(checkpoint)
        return
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints stays out of the answers
    prompts, new = workload()
    run = SIDES[kind](checkpoint, slots)
    print(json.dumps("ready"), file=answers, flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        tokens = run(prompts, new)
        answer = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "tokens": tokens,
        }
        print(json.dumps(answer), file=answers, flush=True)


def make_checkpoint(folder: str) -> None:
    """Random weights as transformers initializes and saves them."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).save_pretrained(folder)


Run = Callable[[list[list[int]], list[int]], Outputs]


def load_jaxmoe(checkpoint: str) -> Any:
    """The model in jaxmoe on one device."""
    import jaxmoe

    jaxmoe.simulate_devices(1)
    return jaxmoe.load(checkpoint, mesh=jaxmoe.make_mesh())


def continuous(checkpoint: str, slots: int) -> Run:
    """jaxmoe's continuous batching."""
    from jaxmoe.generation import ContinuousEngine, Request

    engine = ContinuousEngine(load_jaxmoe(checkpoint), num_slots=slots, max_length=2 * LONGEST)

    def run(prompts: list[list[int]], new: list[int]) -> Outputs:
        # Nothing of an earlier round is found again.
        engine.forget_prefixes()
        outputs: dict[int, list[int]] = {}
        for prompt, count in zip(prompts, new, strict=True):
            outputs[engine.submit(Request(token_ids=prompt, max_new_tokens=count))] = []
        while engine.has_work:
            for result in engine.step():
                outputs[result.request_id].append(result.token_id)
        return list(outputs.values())

    return run


def static(checkpoint: str, slots: int) -> Run:
    """jaxmoe's static batch, all prompts at once; each row ends at its own number of tokens."""
    del slots
    from jaxmoe import SamplingParams
    from jaxmoe.generation import Engine

    model = load_jaxmoe(checkpoint)

    def run(prompts: list[list[int]], new: list[int]) -> Outputs:
        have = [0] * len(prompts)

        def on_token(index: int, token: int, reason: Any) -> bool:
            have[index] += 1
            return have[index] == new[index]

        rows = Engine(model).run(prompts, SamplingParams(), max_new_tokens=max(new), on_token=on_token)
        return [row.token_ids for row in rows]

    return run


def load_transformers(checkpoint: str, attention: str) -> Any:
    """The model in transformers, with its fastest experts on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation=attention, experts_implementation="grouped_mm"
    ).eval()


def padded(size: int) -> Callable[[str, int], Run]:
    """transformers' `generate` in batches of a size, padded on the left; each batch ends with its longest row."""

    def side(checkpoint: str, slots: int) -> Run:
        del slots
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        model = load_transformers(checkpoint, "sdpa")

        class Ends(StoppingCriteria):
            """A row has ended where it has as many tokens as were asked for."""

            def __init__(self, prompt: int, new: list[int]):
                self.ends = torch.tensor(new) + prompt

            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                return input_ids.shape[1] >= self.ends

        @torch.inference_mode()
        def run(prompts: list[list[int]], new: list[int]) -> Outputs:
            outputs: Outputs = []
            for first in range(0, len(prompts), size):
                batch, counts = prompts[first : first + size], new[first : first + size]
                longest = max(map(len, batch))
                tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in batch])
                mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
                ends = StoppingCriteriaList([Ends(longest, counts)])
                found = model.generate(
                    tokens,
                    attention_mask=mask,
                    max_new_tokens=max(counts),
                    do_sample=False,
                    pad_token_id=0,
                    stopping_criteria=ends,
                )
                outputs += [row[longest : longest + count].tolist() for row, count in zip(found, counts, strict=True)]
            return outputs

        return run

    return side


def their_continuous(checkpoint: str, slots: int) -> Run:
    """transformers' continuous batching, its sizes as it chooses them for this workload."""
    del slots
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = load_transformers(checkpoint, "paged|sdpa")
    settings = GenerationConfig(do_sample=False, max_new_tokens=LONGEST, eos_token_id=-1, pad_token_id=0)
    config = ContinuousBatchingConfig(max_memory_percent=0.1, allow_block_sharing=False)

    @torch.inference_mode()
    def run(prompts: list[list[int]], new: list[int]) -> Outputs:
        outputs: dict[str, list[int]] = {}
        with model.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=config, block=True, timeout=30
        ) as manager:
            for number, (prompt, count) in enumerate(zip(prompts, new, strict=True)):
                outputs[manager.add_request(prompt, request_id=f"request {number}", max_new_tokens=count)] = []
            left = len(prompts)
            while left:
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    outputs[result.request_id] = list(result.generated_tokens)
                    left -= 1
                elif result is None and not manager.is_running():
                    raise SystemExit("transformers' continuous batching ended before its requests")
        return list(outputs.values())

    return run


SIDES: dict[str, Callable[[str, int], Run]] = {
    "jaxmoe, static batch": static,
    OURS: continuous,
    **{f"transformers, generate, batches of {size}": padded(size) for size in (8, 16, 64)},
    "transformers, continuous batching": their_continuous,
}


if __name__ == "__main__":
    main()
