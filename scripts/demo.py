"""Loads the checkpoint in demo/ onto a mesh of simulated CPU devices and streams Python from it.

scripts/demo makes an environment and runs this in it.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import jaxmoe
from jaxmoe import GenerationStats, TokenEvent
from jaxmoe.generation import expert_bytes_table
from jaxmoe.mesh import parse_mesh

CHECKPOINT = Path(__file__).resolve().parent.parent / "demo"
# Without a line's end: a token of this model joins it to the indentation that follows.
PROMPTS = ['def parse_header(line, separator=":"):', "def is_valid(name):"]


def main() -> None:
    """Mesh, load, table, text, rates."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="another checkpoint folder")
    parser.add_argument("--mesh", default="dp=2,tp=2,ep=2", help="sizes of the mesh's axes (default: dp=2,tp=2,ep=2)")
    parser.add_argument("--placement", default="linear", help="linear or round_robin (default: linear)")
    parser.add_argument("--prompt", action="append", help="may be given more than once (default: two signatures)")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="for each prompt (default: 96)")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 takes the likeliest token (default: 0.6)")
    parser.add_argument("--python", metavar="VERSION", help="with which scripts/demo makes the environment")
    args = parser.parse_args()

    console = Console(highlight=False)
    try:
        sizes = parse_mesh(args.mesh)
        devices = math.prod(sizes.values())
        jaxmoe.simulate_devices(devices)
        console.print(f"[bold]{devices} simulated devices[/] as a mesh of {args.mesh}")
        model = jaxmoe.load(args.checkpoint, mesh=jaxmoe.make_mesh(**sizes), placement=args.placement, progress=True)
        report = model.load_report
        console.print(f"read {report.bytes_read:,} of {report.bytes_needed:,} bytes needed in {report.seconds:.2f} s")
        console.print(expert_bytes_table(report.expert_bytes_per_device))
        total = GenerationStats()
        for prompt in args.prompt or PROMPTS:
            total += stream_text(
                console, model, prompt, max_new_tokens=args.max_new_tokens, temperature=args.temperature
            )
    except (ValueError, OSError) as error:
        raise SystemExit(f"scripts/demo: {error}") from error
    console.print(f"\n{total.summary()}", soft_wrap=True)


def stream_text(console: Console, model: object, prompt: str, **options: Any) -> GenerationStats:
    """Prints the prompt, in bold, and its continuation token by token."""
    stats = GenerationStats()
    console.print(f"\n[bold]{escape(prompt)}[/]", end="", soft_wrap=True)
    jaxmoe.generate(
        model,
        [prompt],
        seed=0,
        stream=lambda event: print(printable(event), end="", flush=True),
        stats=stats,
        **options,
    )
    print()
    return stats


def printable(event: TokenEvent) -> str:
    """The event's text without control characters: a model may well write an escape sequence."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in event.text)


if __name__ == "__main__":
    main()
