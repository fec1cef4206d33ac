"""``jaxmoe generate``: prompts in, text out, token by token, or file to file (`batch_file`)."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import batch_file, loading, options, processes

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxmoe.generation import GenerationStats, Output, TokenEvent

HELP = "generate text from prompts"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe generate``."""
    parser.add_argument(
        "checkpoint", help="a checkpoint directory, as transformers writes it, or a name in the hub's cache"
    )
    source = parser.add_argument_group("prompts, from one of").add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a text, - for all of stdin (repeatable)")
    source.add_argument(
        "--prompt-ids", action="append", type=_token_ids, metavar="5,6,7", help="token ids (repeatable)"
    )
    source.add_argument(
        "--prompt-file",
        metavar="FILE",
        help='one prompt a line, or .jsonl with {"prompt": ...}; - for stdin',
    )
    source.add_argument(
        "--input",
        metavar="FILE.jsonl",
        help="a file of any size, whose lines may have settings of their own; an interrupted run goes on",
    )
    parser.add_argument(
        "--use-adapter",
        action="append",
        metavar="NAME",
        help="adapter of all prompts, or (given for each) of one; none for the model as it is (none)",
    )
    parser.add_argument("--chat", action="store_true", help="put prompts through the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument("--batch-size", type=options.count, metavar="N", help="prompts at a time (32)")

    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens per prompt (64)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest, 0 for all (0)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest up to P (1)")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="at least P as likely as the top (0)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1 discourages (1)")
    group.add_argument("--seed", type=int, metavar="N", help="same seed and prompt, same text (default: fresh)")
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the text here (repeatable)")
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-new-tokens")
    group.add_argument(
        "--speculate",
        choices=("mtp",),
        help="guess tokens with the layers for multi-token prediction, which are then loaded too (greedy only)",
    )
    group.add_argument("--num-drafts", type=options.count, metavar="K", help="guesses in a step (one by each layer)")

    batch_file.add_options(parser)
    options.add_mesh_options(parser)
    processes.add_options(parser)
    loading.add_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line for each prompt")
    parser.add_argument(
        "--record-routing", metavar="FILE.npz", help="write the experts that every token chose, for `jaxmoe place`"
    )
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="what was read, the forms of weights, where experts are and how tokens travel to them, on stderr",
    )


def run(args: argparse.Namespace) -> None:
    """Generate and print, in one process or as one of several."""
    if args.system is not None and not args.chat:
        args.usage_error("--system goes with --chat")
    batch_file.check(args)
    if args.chat and args.prompt_ids:
        args.usage_error("--chat is for text: --prompt, --prompt-file or --input")
    if args.num_drafts and not args.speculate:
        args.usage_error("--num-drafts goes with --speculate")
    if args.speculate and (args.temperature > 0 or args.repetition_penalty != 1 or args.record_routing):
        args.usage_error("--speculate goes with none of --temperature, --repetition-penalty and --record-routing")
    if processes.is_one_of_several(args) and "-" in [args.prompt_file, *(args.prompt or ())]:
        args.usage_error("every process reads the prompts, and stdin is one's alone: give a file in place of -")
    with processes.joined(args):
        if args.input is not None:
            batch_file.run(args)
        else:
            _generate_together(args)


def _generate_together(args: argparse.Namespace) -> None:
    """Do the work of `run`, the same in each of several processes."""
    prompts = _read_prompts(args)
    batch_size = args.batch_size or 32
    options.check_folders(args, "record_routing")
    mesh = options.make_mesh(args)
    # Where one process finds a program and another compiles it, they may wait for each other: a folder that all of them
    # see has to be named.
    if args.compile_cache is not None or not processes.is_one_of_several(args):
        options.use_compile_cache(args)

    from jaxmoe.distributed import is_first
    from jaxmoe.generation import GenerationStats, SamplingParams, encode, generate
    from jaxmoe.generation.arguments import seeds_for, stop_strings, text_streams

    adapters = _adapter_of_each(args, len(prompts))
    # Prompts and settings are checked before the weights are read, which may take minutes.
    params = SamplingParams(**{name: getattr(args, name) for name in options.SAMPLING})
    if params.without_effect:
        print(params.without_effect, file=sys.stderr)
    seeds_for(args.seed, len(prompts))
    outline = loading.outline(args)
    token_ids = encode(outline, _conversations(prompts, args), max_new_tokens=args.max_new_tokens)
    text_streams(len(token_ids), outline, None, stop_strings(args.stop))
    model = loading.load(args, mesh, mtp=args.speculate == "mtp")
    if args.verbose:
        _print_expert_bytes(model)
        print(model.load_report.describe(), file=sys.stderr)
        first = token_ids[:batch_size]
        longest = max(map(len, first), default=1)
        print(model.describe(batch_size=len(first), prompt_length=longest), file=sys.stderr)
    live = len(prompts) == 1 and not args.json and sys.stdout.isatty()
    total = GenerationStats()
    with model.record_routing(token_ids=True) if args.record_routing else nullcontext() as routing:
        for start in range(0, len(prompts), batch_size):
            batch = slice(start, start + batch_size)
            stats = GenerationStats()
            outputs = generate(
                model,
                token_ids[batch],
                max_new_tokens=args.max_new_tokens,
                sampling_params=params,
                seed=args.seed,
                adapters=adapters[batch] if any(adapters) else None,
                stop=args.stop,
                ignore_eos=args.ignore_eos,
                stream=_print_piece if live else None,
                stats=stats,
                speculate=args.speculate,
                num_drafts=args.num_drafts,
            )
            total += stats
            for index, output in enumerate(outputs, start):
                if args.json:
                    print(json.dumps(_record(prompts[index], output, stats)), flush=True)
                elif not live:
                    title = f"[{index}] {prompts[index]}\n" if len(prompts) > 1 else ""
                    print(f"{title}{_readable(output.text, output.token_ids)}", flush=True)
    if routing is not None and is_first():
        _write_whole(Path(args.record_routing), routing.trace(incomplete=True).save)
        if routing.dropped_steps:
            print(
                f"{args.record_routing} has the first {routing.num_steps - routing.dropped_steps} of {routing.num_steps} "
                f"steps: choices of tokens are kept up to {routing.most_bytes:,} bytes",
                file=sys.stderr,
            )
    print(f"{_describe(mesh)}: {total.summary()}", file=sys.stderr)


def _adapter_of_each(args: argparse.Namespace, count: int) -> list[str | None]:
    """Give the adapter's name for each prompt."""
    _, named = loading.adapters(args)
    if named and not args.use_adapter:
        args.usage_error(
            f"--adapter NAME=DIR is used where --use-adapter names it; say --use-adapter {next(iter(named))}, none for the "
            "model without it, or --adapter DIR to merge it into the weights"
        )
    chosen = args.use_adapter or ["none"]
    if len(chosen) not in (1, count):
        args.usage_error(f"--use-adapter is given once, or for each of the {count} prompts; got {len(chosen)}")
    if unknown := [name for name in chosen if name != "none" and name not in named]:
        args.usage_error(
            f"--use-adapter names one of --adapter NAME=DIR; {unknown[0]} is none of {', '.join(named) or 'none'}"
        )
    names = [None if name == "none" else name for name in chosen]
    return names * count if len(names) == 1 else names


def _describe(mesh: "Mesh") -> str:
    from jaxmoe.mesh import write_mesh

    devices = f"{mesh.size} {mesh.devices.flat[0].platform} device{'s' if mesh.size > 1 else ''}"
    return f"mesh {write_mesh(mesh.shape)} on {devices}"


def _write_whole(path: "Path", write: Callable[["Path"], None]) -> None:
    """Write a file under another name first, so that under its own it is there whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_prompts(args: argparse.Namespace) -> list[Any]:
    from jaxmoe.generation import read_prompt_file

    if args.prompt_file is not None:
        return read_prompt_file(args.prompt_file)
    if args.prompt_ids is not None:
        return args.prompt_ids
    return [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompt]


def _conversations(prompts: list[Any], args: argparse.Namespace) -> list[Any]:
    """Make conversations of texts, with --chat; token ids and messages of a .jsonl file stay as they are."""
    if not args.chat:
        return prompts
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [[*system, {"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]


def _record(prompt: Any, output: "Output", stats: "GenerationStats") -> dict[str, Any]:
    """Make a line of --json; the timing is that of the whole batch."""
    return {
        "prompt": prompt,
        "token_ids": output.token_ids,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "adapter": output.adapter,
        "timing": stats.to_dict(),
    }


def _print_piece(event: "TokenEvent") -> None:
    separator = "," if event.text is None and not event.finish_reason else ""
    end = "\n" if event.finish_reason else separator
    print(_readable(event.text, [event.token_id]), end=end, flush=True)


def _readable(text: str | None, token_ids: list[int]) -> str:
    from jaxmoe.generation import terminal_text

    if text is None:
        return ",".join(map(str, token_ids))
    return terminal_text(text) if sys.stdout.isatty() else text


def _print_expert_bytes(model: Any) -> None:
    from rich.console import Console

    from jaxmoe.generation import expert_bytes_table

    Console(stderr=True).print(expert_bytes_table(model.load_report.expert_bytes_per_device))


def _token_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"token ids are integers between commas, as 5,6,7; got {text!r}")
    return [int(part) for part in parts]
