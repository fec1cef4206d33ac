#!/usr/bin/env python3
"""Does a model compile for GPUs that are not here, packed where it is quantized, and what does it exchange?

It compiles prefill and a decode step of a checkpoint, of which config.json is enough, all layers or the first few. Then it
checks that the program takes the bytes that `jaxmoe plan` counts, and where weights are packed that it makes no array as
large as a layer's experts on a device; longer prompts than the default have scores of attention that are. It prints bytes,
and seconds of processor time, those of ptxas included, which other programs on the machine hardly change; with --exchanges
every collective of both programs, the bytes that a device sends, and the work that is scheduled beside it. It needs jax's
compiler for GPUs (the extra "aot"), and jax 0.11.2 or newer for the kernels "mosaic_gpu".

    JAX_PLATFORMS=cpu python scripts/compile_model.py path/to/Qwen3-30B-A3B-FP8 --chip h100
    JAX_PLATFORMS=cpu python scripts/compile_model.py docs/configs/Qwen3-30B-A3B --layers 2 --ep 8 --exchanges
    JAX_PLATFORMS=cpu python scripts/compile_model.py path/to/DeepSeek-V3 --chip h200 --ep 8 --layers 5
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jaxmoe
from jaxmoe.models import read_model_config
from jaxmoe.planning import describe_exchanges
from tests.support.packed_programs import check_arguments, check_nothing_is_decoded
from tests.support.published import first_layers


def main() -> None:
    """Parse the command line, compile, check, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="directory with config.json")
    parser.add_argument("--chip", default="h100", help="kind of GPU (default h100)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs along tp (default 1)")
    parser.add_argument("--ep", type=int, default=1, help="GPUs along ep (default 1)")
    parser.add_argument("--layers", type=int, help="first layers alone (default: all)")
    parser.add_argument("--kernels", default="mosaic_gpu", help="grouped matmul (default mosaic_gpu)")
    parser.add_argument("--dispatch", default="auto", help="way of tokens to experts (default auto)")
    parser.add_argument(
        "--exchanges", action="store_true", help="print every collective: bytes, axes, and what hides it"
    )
    parser.add_argument("--activations", choices=("checkpoint",), help="round inputs as the checkpoint asks")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences (default 8)")
    parser.add_argument("--prompt-length", type=int, default=256, help="tokens of the prefill (default 256)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens that the cache holds (default 512)")
    args = parser.parse_args()
    raw = json.loads((args.checkpoint / "config.json").read_text())
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(first_layers(raw, args.layers) if args.layers else raw))
        compile_and_check(Path(directory), args)


def compile_and_check(checkpoint: Path, args: argparse.Namespace) -> None:
    """Compile both steps of a checkpoint, check what they take and make, and print a line for each."""
    sizes = {"tp": args.tp, "ep": args.ep}
    shared = {"batch_size": args.batch_size, "max_length": args.max_length, "activations": args.activations}
    planned = jaxmoe.plan(checkpoint, **sizes, **shared, dtype="bfloat16")
    mesh = jaxmoe.make_mesh(**sizes, devices=list(jaxmoe.gpu_topology(args.chip, args.tp * args.ep)))
    before = os.times()
    steps = jaxmoe.compile_steps(
        checkpoint,
        mesh,
        kernels=args.kernels,
        dispatch=args.dispatch,
        prompt_length=args.prompt_length,
        **shared,
    )
    after = os.times()
    config = read_model_config(checkpoint)[1]
    print(f"{len(config.layers)} layers, routed experts held as {', '.join(planned.held['routed experts'])}")
    for name, step in steps.items():
        check_arguments(step, planned)
        if set(planned.held["routed experts"]) != {"bfloat16"}:
            check_nothing_is_decoded(step, config, mesh.size)
        products = step.text.count('custom_call_target="mosaic_gpu')
        print(
            f"{name:8} {step.argument_bytes:,} bytes of arguments, {step.temp_bytes:,} of temporaries, {products} products "
            f"by Mosaic GPU, collectives {step.collectives}"
        )
        if args.exchanges:
            print("\n".join(f"         {line}" for line in describe_exchanges(step.exchanges)))
    own = after.user + after.system - before.user - before.system
    others = after.children_user + after.children_system - before.children_user - before.children_system
    print(
        f"compiled in {after.elapsed - before.elapsed:.0f} s, {own:.0f} s of processor time and {others:.0f} s of ptxas"
    )


if __name__ == "__main__":
    main()
