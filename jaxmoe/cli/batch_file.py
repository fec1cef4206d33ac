"""``jaxmoe generate --input FILE --output FILE``: its options, and its work."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import loading, options

if TYPE_CHECKING:
    from jaxmoe.batches import LineSettings

# Options that say nothing without --input, and None where they are left out.
_OWN = (
    *("output", "order", "n", "logprobs", "min_new_tokens", "logit_bias", "json_schema", "token_ids"),
    *("num_slots", "num_pages", "max_length"),
)
# Options that say nothing with it.
_OTHERS = ("json", "batch_size", "record_routing", "speculate", "num_drafts")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``--input``, but for itself."""
    group = parser.add_argument_group("with --input")
    group.add_argument("--output", metavar="FILE.jsonl", help="file to write, or to go on with after an interruption")
    group.add_argument("--order", choices=("input", "finished"), help="lines as in the input, or as they come (input)")
    group.add_argument("--n", type=options.count, metavar="N", help="texts for each line (1)")
    group.add_argument("--logprobs", type=_number, metavar="N", help="log-probabilities, and those of the N likeliest")
    group.add_argument("--min-new-tokens", type=_number, metavar="N", help="no EOS token before so many (0)")
    group.add_argument("--logit-bias", type=_bias, metavar="ID=X,ID=X", help="numbers added to the logits of tokens")
    group.add_argument("--json-schema", metavar="FILE", help='texts are JSON of this schema (extra "constrain")')
    group.add_argument("--token-ids", action="store_const", const=True, help="token ids beside the text")
    options.add_slots(group, "lines")


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.input is None:
        for name in _OWN:
            if getattr(args, name) is not None:
                args.usage_error(f"{_option(name)} goes with --input")
        return
    if args.output is None:
        args.usage_error("--input goes with --output, the file to write")
    for name in _OTHERS:
        if getattr(args, name) not in (None, False):
            args.usage_error(f"{_option(name)} goes with --prompt, --prompt-ids or --prompt-file, and not with --input")
    if len(args.use_adapter or ()) > 1:
        args.usage_error('--use-adapter is given once with --input; a line has its own as "adapter"')


def run(args: argparse.Namespace) -> None:
    """Do what is missing of the output."""
    mesh = options.make_mesh(args)
    if args.compile_cache is not None or not mesh.is_multi_process:
        options.use_compile_cache(args)

    from jaxmoe.batches import Batch, run_batch

    settings = _settings(args)
    outline = loading.outline(args)
    options.check_max_length(args, outline.config)
    with Batch(
        outline,
        Path(args.input),
        Path(args.output),
        settings=settings,
        order=args.order or "input",
        token_ids=bool(args.token_ids),
        several=mesh.is_multi_process,
    ) as batch:
        if batch.done_before:
            print(f"{args.output} has {batch.done_before} of {batch.total} lines", file=sys.stderr)
        model = loading.load(args, mesh)
        if args.verbose:
            print(model.load_report.describe(), file=sys.stderr)
        result = run_batch(
            batch,
            model,
            num_slots=args.num_slots,
            num_pages=args.num_pages,
            max_length=args.max_length,
            progress=not args.no_progress,
        )
    rate = result.generated_tokens / max(result.seconds, 1e-9)
    print(
        f"{args.output} has {result.lines} lines; {result.generated_tokens:,} tokens were generated in "
        f"{result.seconds:.1f} s, {rate:,.1f} a second",
        file=sys.stderr,
    )
    if result.errors:
        raise RuntimeError(
            f'{result.errors} of {result.lines} lines have an error; it is under "error" in their output'
        )


def _settings(args: argparse.Namespace) -> "LineSettings":
    from jaxmoe.batches import LineSettings
    from jaxmoe.generation import SamplingParams

    _, named = loading.adapters(args)
    adapter = None if args.use_adapter in (None, ["none"]) else args.use_adapter[0]
    if adapter is not None and adapter not in named:
        args.usage_error(
            f"--use-adapter names one of --adapter NAME=DIR; {adapter} is none of {', '.join(named) or 'none'}"
        )
    return LineSettings(
        params=SamplingParams(**{name: getattr(args, name) for name in options.SAMPLING}),
        max_new_tokens=args.max_new_tokens,
        min_new_tokens=args.min_new_tokens or 0,
        seed=args.seed,
        stop=tuple(args.stop or ()),
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
        n=args.n or 1,
        logit_bias=args.logit_bias or {},
        schema=None if args.json_schema is None else _schema(args.json_schema),
        adapter=adapter,
        chat=args.chat,
        system=args.system,
    )


def _schema(file: str) -> Any:
    try:
        schema = json.loads(Path(file).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"a JSON schema is JSON; {file} is not: {error}") from error
    if not isinstance(schema, dict):
        raise ValueError(f"a JSON schema is an object; {file} has {type(schema).__name__}")
    return schema


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"an integer of at least 0; got {text!r}")
    return int(text)


def _bias(text: str) -> dict[int, float]:
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {int(token): float(value) for token, value in pairs}
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"token ids and numbers, as 5=-100,7=2.5; got {text!r}") from error
