"""What each process of a test does: load, generate greedily and sampled, print a line of JSON."""

import argparse
import json
from pathlib import Path

import jaxmoe
import jaxmoe.distributed

PROMPTS = [[5, 6, 7], [8, 9], [3]]


def results(checkpoint: str, *, full: bool, programs: bool, **mesh: int) -> dict:
    """Tokens, and what was read, of one checkpoint on all devices there are; with logits if `full`.

    With `programs`, tokens come from every kind of program. Inputs of packed weights are rounded.
    """
    quantized = "quantization_config" in json.loads((Path(checkpoint) / "config.json").read_text())
    model = jaxmoe.load(checkpoint, mesh=jaxmoe.make_mesh(**mesh), activations="checkpoint" if quantized else None)

    def tokens(**settings) -> list[list[int]]:
        return [output.token_ids for output in jaxmoe.generate(model, PROMPTS, max_new_tokens=6, **settings)]

    def continuous() -> list[list[int]]:
        engine = jaxmoe.ContinuousEngine(model, num_slots=4, max_length=16, page_size=4)
        found = {engine.submit(jaxmoe.Request(token_ids=prompt, max_new_tokens=6)): [] for prompt in PROMPTS}
        while engine.has_work:
            for result in engine.step():
                found[result.request_id].append(result.token_id)
        return [*found.values()]

    report = model.load_report
    return {
        "greedy": tokens() if programs else [],
        "continuous": continuous() if programs else [],
        "sampled": tokens(temperature=1.0, seed=7, top_k=20),
        "drawn": tokens(temperature=1.0, top_k=20),
        "rounded": quantized,
        "logits": [float(abs(model(PROMPTS[:1])).sum())] if full else [],
        "bytes_read": report.bytes_read,
        "bytes_needed": report.bytes_needed,
        "expert_bytes": report.expert_bytes_per_device,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--mesh", type=json.loads)
    parser.add_argument("--simulate", type=int)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args()
    jaxmoe.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    jaxmoe.simulate_devices(args.simulate)
    import jax

    found = {
        "process": args.process_id,
        "local_devices": [device.id for device in jax.local_devices()],
        "neighbors": [
            len({device.process_index for device in row})
            for row in jaxmoe.make_mesh(**args.mesh).devices.reshape(-1, 2)
        ],
        "results": [
            results(checkpoint, full=args.full, programs=args.full and checkpoint is args.checkpoints[0], **args.mesh)
            for checkpoint in args.checkpoints
        ],
    }
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
