"""``jaxmoe warm``: a model's programs compiled before its weights are here."""

import argparse
import sys
import time
from typing import TYPE_CHECKING

from jaxmoe.cli import loading, options

if TYPE_CHECKING:
    from jaxmoe.generation.programs import Record

HELP = "compile a model's programs, so that its first start is as quick as its second"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``jaxmoe warm``."""
    parser.add_argument("checkpoint", help="a checkpoint directory, of which config.json is enough where it is plain")
    group = parser.add_argument_group("for jaxmoe serve, as there")
    options.add_slots(group, "requests")
    group.add_argument("--no-expert-metrics", action="store_true", help="for a server that does not count experts")
    group = parser.add_argument_group("for jaxmoe generate too, with all three")
    group.add_argument("--batch-size", type=options.count, metavar="N", help="prompts at a time")
    group.add_argument("--prompt-length", type=options.count, metavar="N", help="tokens of the longest prompt")
    group.add_argument("--max-new-tokens", type=options.count, metavar="N", help="tokens per prompt")
    options.add_mesh_options(parser)
    loading.add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Compile, and name each program on stderr."""
    batch = [args.batch_size, args.prompt_length, args.max_new_tokens]
    if any(batch) and not all(batch):
        args.usage_error("--batch-size, --prompt-length and --max-new-tokens go together")
    if loading.adapters(args)[1]:
        args.usage_error(
            "adapters beside the weights change the programs, and are not compiled for here: leave them out"
        )
    mesh = options.make_mesh(args)
    options.use_compile_cache(args)

    from jaxmoe.planning import warm

    model = warm.abstract_checkpoint_model(
        args.checkpoint,
        mesh,
        placement=options.read_placement(args.placement),
        dtype=args.dtype,
        # A merged adapter is added to decoded weights.
        quantized="dequantize" if args.adapter and args.quantized is None else args.quantized,
        activations=args.activations,
        expert_axes=args.expert_axes,
        dispatch=args.dispatch,
        kernels=args.kernels,
    )
    begin = time.perf_counter()
    record: Record = "nothing" if args.no_expert_metrics else "counts"
    names = [
        warm.warm_engine(
            model, num_slots=args.num_slots, num_pages=args.num_pages, max_length=args.max_length, record=record
        )
    ]
    if all(batch):
        names.append(
            warm.warm_batch(
                model, batch_size=args.batch_size, prompt_length=args.prompt_length, max_new_tokens=args.max_new_tokens
            )
        )
    for program in (name for each in names for name in each):
        print(f"{time.perf_counter() - begin:7.1f} s  {program}", file=sys.stderr, flush=True)
