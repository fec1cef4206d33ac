"""Options of how a checkpoint is loaded, for commands that run a model, and the load that they stand for."""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from jaxmoe.cli import options

if TYPE_CHECKING:
    from jax.sharding import Mesh


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of how a checkpoint is loaded, and of the compile cache."""
    group = parser.add_argument_group("loading")
    options.add_placement(group)
    group.add_argument("--dtype", help="of weights and activations (default: the checkpoint's own)")
    options.add_quantized(group)
    options.add_activations(group)
    group.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="DIR|NAME=DIR",
        help="a LoRA adapter to merge into the weights, or to hold beside them under a name (repeatable)",
    )
    options.add_expert_axes(group)
    group.add_argument(
        "--dispatch",
        type=options.dispatch,
        default="auto",
        metavar="NAME|prefill=NAME,decode=NAME",
        help="how tokens travel to experts (auto)",
    )
    group.add_argument("--kernels", default="auto", metavar="NAME", help="grouped matmul backend (auto)")
    group.add_argument("--check-finite", action="store_true", help="refuse a checkpoint with NaN or infinity")
    options.add_compile_cache(group)
    group.add_argument("--no-progress", action="store_true", help="draw no progress bar")


def adapters(args: argparse.Namespace) -> tuple[str | None, dict[str, str]]:
    """Tell the adapter to merge, and those to hold beside the weights by name; a directory may have = in its name."""
    named = {text.partition("=")[0]: text.partition("=")[2] for text in args.adapter if _is_named(text)}
    merged = [text for text in args.adapter if not _is_named(text)]
    if len(merged) > 1 or len(named) + len(merged) < len(args.adapter):
        args.usage_error("--adapter is one DIR to merge, and NAME=DIR of names that differ; give each once")
    return (merged[0] if merged else None), named


def _is_named(text: str) -> bool:
    return "=" in text and not Path(text).is_dir()


def outline(args: argparse.Namespace) -> Any:
    """Read the config of a model and find its files, as a `jaxmoe.generation.model.Outline`; no weight is read."""
    from jaxmoe.config import directory_of, find_checkpoint
    from jaxmoe.models import read_model_config

    source = directory_of(find_checkpoint(args.checkpoint))
    return SimpleNamespace(config=read_model_config(source)[1], source=source)


def load(args: argparse.Namespace, mesh: "Mesh", *, mtp: bool = False) -> Any:
    """Load the checkpoint as the options ask."""
    import jaxmoe

    adapter, named = adapters(args)
    return jaxmoe.load(
        args.checkpoint,
        mesh=mesh,
        placement=options.read_placement(args.placement),
        dtype=args.dtype,
        quantized=args.quantized,
        activations=args.activations,
        adapter=adapter,
        adapters=named or None,
        mtp=mtp,
        expert_axes=args.expert_axes,
        dispatch=args.dispatch,
        kernels=args.kernels,
        # A bar in a log file is noise.
        progress=sys.stderr.isatty() and not args.no_progress,
        check_finite=args.check_finite,
    )
