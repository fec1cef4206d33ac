"""``jaxmoe serve``: a model behind OpenAI's completions and chat completions."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmoe.cli import loading, options

if TYPE_CHECKING:
    from jaxmoe.models import Decoder

HELP = "serve a model to OpenAI's clients"
KEY_VARIABLE = "JAXMOE_API_KEY"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe serve``."""
    parser.add_argument(
        "checkpoint", help="a checkpoint directory, as transformers writes it, or a name in the hub's cache"
    )
    group = parser.add_argument_group("address and clients")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; others than loopback need a key (127.0.0.1)"
    )
    group.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen at, 0 for a free one (8000)")
    group.add_argument(
        "--api-key-file", metavar="FILE", help=f"keys of clients, one a line (default: that of {KEY_VARIABLE}, if set)"
    )
    group.add_argument("--name", help="name of the model for clients (the checkpoint's directory)")
    group.add_argument("--max-queue", type=_number, default=256, metavar="N", help="requests that may wait (256)")
    group.add_argument(
        "--max-body", type=options.count, default=4 * 2**20, metavar="BYTES", help="largest request (4194304)"
    )
    group.add_argument(
        "--drain", type=_seconds, default=30.0, metavar="SECONDS", help="time for requests to end after SIGTERM (30)"
    )
    group = parser.add_argument_group("generation")
    options.add_slots(group, "requests")
    group.add_argument("--rebalance", action="store_true", help="move experts between devices when loads become uneven")
    group.add_argument(
        "--no-expert-metrics", action="store_true", help="do not count for /metrics which experts tokens choose"
    )
    options.add_mesh_options(parser)
    loading.add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Load and serve."""
    keys = _keys(args.api_key_file)
    try:
        from jaxmoe.generation.tokenizer import tokenizer_of
        from jaxmoe.serving import listen, serve
    except ModuleNotFoundError as error:
        raise ImportError(
            f'the server needs what the extra "serve" installs: pip install "jaxmoe[serve]" ({error})'
        ) from error
    # What can be refused is refused before the weights are read, which may take minutes.
    bound = listen(args.host, args.port, keys=keys)
    try:
        loading.adapters(args)
        outline = loading.outline(args)
        options.check_max_length(args, outline.config)
        tokenizer_of(outline.source)
        mesh = options.make_mesh(args)
        options.use_compile_cache(args)
        model: Decoder = loading.load(args, mesh)
        name = args.name or Path(args.checkpoint).resolve().name
        serve(
            model,
            bound,
            name=name,
            keys=keys,
            num_slots=args.num_slots,
            num_pages=args.num_pages,
            max_length=args.max_length,
            queue=args.max_queue,
            body_bytes=args.max_body,
            record=not args.no_expert_metrics,
            rebalance=args.rebalance,
            drain_seconds=args.drain,
            on_compiled=lambda program: print(f"compiled: {program}", file=sys.stderr, flush=True),
            on_start=lambda url: print(f"{name} is served at {url}/v1", file=sys.stderr, flush=True),
        )
    finally:
        bound.close()


def _keys(file: str | None) -> list[str]:
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "")
        return [key] if key else []
    keys = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    keys = [line for line in keys if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"{file} has one key a line; it has none")
    return keys


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"an integer of at least 0; got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a finite number of at least 0; got {text!r}")
    return value
