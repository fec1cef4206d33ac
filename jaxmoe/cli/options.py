"""Options that several commands share, and the steps that they stand for."""

import argparse
import math
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import Any

    from jax.sharding import Mesh

    from jaxmoe.generation.model import Limits
    from jaxmoe.placement import ExpertPlacement, RoutingTrace

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options of `jaxmoe.SamplingParams`, by its names."""


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--mesh`` and ``--simulate``."""
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--mesh",
        type=mesh_sizes,
        metavar="dp=1,tp=2,ep=4",
        help="mesh sizes, axes left out being 1; a smaller mesh is of the first devices (default: every device on ep)",
    )
    group.add_argument("--simulate", type=count, metavar="N", help="use N simulated CPU devices (in each process)")


def add_placement(parser: argparse._ActionsContainer, default: str | None = "linear") -> None:
    """Add ``--placement``; `default` is its value where it is left out."""
    parser.add_argument("--placement", default=default, metavar="NAME|FILE.json", help="where experts go (linear)")


def add_expert_axes(parser: argparse._ActionsContainer) -> None:
    """Add ``--expert-axes``."""
    parser.add_argument(
        "--expert-axes", type=axes, default=("ep",), metavar="ep,tp", help="mesh axes that share the experts (ep)"
    )


def add_adapter(parser: argparse._ActionsContainer) -> None:
    """Add ``--adapter``."""
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter to merge into the weights")


def add_quantized(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Add ``--quantized``; `default` is its value where it is left out."""
    parser.add_argument(
        "--quantized",
        choices=("keep", "dequantize"),
        default=default,
        help="quantized weights stay packed where they can (keep, the default), or are all decoded",
    )


def add_activations(parser: argparse._ActionsContainer) -> None:
    """Add ``--activations``."""
    parser.add_argument(
        "--activations",
        choices=("checkpoint",),
        help="round the inputs of packed weights as the checkpoint asks (default: as they are)",
    )


def add_mtp(parser: argparse._ActionsContainer) -> None:
    """Add ``--mtp``."""
    parser.add_argument("--mtp", action="store_true", help="with the layers for multi-token prediction")


def add_compile_cache(parser: argparse._ActionsContainer) -> None:
    """Add ``--compile-cache``."""
    parser.add_argument(
        "--compile-cache",
        metavar="DIR",
        help="folder of compiled programs, which the next start loads, or none (default: in the user's cache folder)",
    )


def use_compile_cache(args: argparse.Namespace) -> None:
    """Do what ``--compile-cache`` asks for, before anything is compiled.

    A default that cannot be used is told on stderr, and the command goes on without it; a folder that was named is an error.
    """
    if args.compile_cache == "none":
        return
    from jaxmoe.compile_cache import CompileCacheError, enable_compile_cache

    try:
        enable_compile_cache(args.compile_cache)
    except CompileCacheError as error:
        if args.compile_cache is not None:
            raise
        print(f"compiled programs are not kept: {error}", file=sys.stderr)


def add_slots(parser: argparse._ActionsContainer, what: str) -> None:
    """Add the sizes of continuous batching; `what` is what a slot holds."""
    parser.add_argument("--num-slots", type=count, metavar="N", help=f"{what} at a time (16 on each part of the batch)")
    parser.add_argument("--num-pages", type=count, metavar="N", help="pages of the cache (what memory holds)")
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="tokens of a prompt and its text together (the model's most)",
    )


def check_max_length(args: argparse.Namespace, limits: "Limits") -> None:
    """Refuse a ``--max-length`` that an engine would, before the weights are read.

    Raises:
        ValueError: it is below 2, or above the model's number of positions.
    """
    from jaxmoe.checks import integer

    if args.max_length is not None:
        integer("max_length", args.max_length, least=2, most=limits.max_position_embeddings)


def check_folders(args: argparse.Namespace, *names: str) -> None:
    """Refuse files to be written in folders that are not there, before the work that they are of.

    Raises:
        FileNotFoundError: one of the options `names` names such a file.
    """
    from pathlib import Path

    for name in names:
        file = getattr(args, name)
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise FileNotFoundError(f"the directory of --{name.replace('_', '-')} {file} does not exist")


def make_mesh(args: argparse.Namespace) -> "Mesh":
    """Make the mesh that ``--mesh`` and ``--simulate`` ask for; a smaller one is of the first devices, which is told."""
    from jaxmoe.mesh import make_mesh, simulate_devices

    if args.simulate is not None:
        simulate_devices(args.simulate)
    import jax

    devices = jax.devices()
    sizes = args.mesh or {"ep": len(devices)}
    needed = math.prod(sizes.values())
    # Of several processes each has a part in the mesh.
    if needed < len(devices) and jax.process_count() == 1:
        print(f"the mesh is of the first {needed} of {len(devices)} devices; the others stay idle", file=sys.stderr)
        devices = devices[:needed]
    return make_mesh(**sizes, devices=devices)


def read_placement(text: str) -> "str | ExpertPlacement | list[ExpertPlacement]":
    """Read the value of ``--placement``: a strategy's name, or a file that ``jaxmoe place`` wrote."""
    return read_placement_file(text) if text.endswith(".json") else text


def read_placement_file(file: str) -> "ExpertPlacement | list[ExpertPlacement]":
    """Read one placement, or one for each MoE layer, from a file that ``jaxmoe place`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no placement.
    """
    from jaxmoe.placement import placements_from_json

    return placements_from_json(read_placement_text(file))


def read_placement_text(file: str) -> str:
    """Read a file of placements, of whatever format.

    Raises:
        FileNotFoundError: there is no such file.
    """
    from pathlib import Path

    if not Path(file).is_file():
        raise FileNotFoundError(f"the placement file {file} does not exist")
    return Path(file).read_text(encoding="utf-8")


def read_trace(files: "Sequence[str]", *, num_experts: int | None, window: int = 1024) -> "RoutingTrace":
    """Read a routing trace of any format, see `jaxmoe.placement.trace_formats.read_trace`.

    Raises:
        FileNotFoundError: one of the files is not there.
        ValueError: they are no trace.
    """
    from pathlib import Path

    from jaxmoe.placement.trace_formats import read_trace

    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"the trace {file} is no file")
    return read_trace(files, num_experts=num_experts, window=window, read_torch=_read_torch)


def _read_torch(path: "Path") -> "Any":
    from jaxmoe.checkpoint.formats import read_torch_object

    return read_torch_object(path)


def mesh_sizes(text: str) -> dict[str, int]:
    """Type of ``--mesh``."""
    from jaxmoe.mesh import parse_mesh

    try:
        return parse_mesh(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def count(text: str) -> int:
    """Type of options that are an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"an integer of at least 1; got {text!r}")
    return int(text)


def counts(text: str) -> list[int]:
    """Type of options that are integers of at least 1."""
    return [count(part.strip()) for part in text.split(",")]


def axes(text: str) -> tuple[str, ...]:
    """Type of ``--expert-axes``."""
    return tuple(axis.strip() for axis in text.split(","))


def dispatch(text: str) -> str | dict[str, str]:
    """Type of ``--dispatch``: one name, or names by phase."""
    if "=" not in text:
        return text
    phases = dict(part.strip().split("=", 1) for part in text.split(",") if "=" in part)
    if len(phases) != len(text.split(",")) or not phases.keys() <= {"prefill", "decode"}:
        raise argparse.ArgumentTypeError(f"a name, or prefill=NAME,decode=NAME; got {text!r}")
    return phases


def numbers(text: str) -> list[float]:
    """Type of options that are a number for each device."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"numbers between commas, one a device; got {text!r}") from error


def integers(text: str) -> list[int]:
    """Type of options that are an integer for each device."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"integers between commas, one a device; got {text!r}") from error


def named_adapter(text: str) -> tuple[str, str]:
    """Type of options that are an adapter with a name: the name, and the directory."""
    name, _, directory = text.partition("=")
    if not name or not directory:
        raise argparse.ArgumentTypeError(f"a name and a directory, as sql=path/to/adapter; got {text!r}")
    return name, directory


def names(text: str) -> list[str]:
    """Type of options that are several names."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise argparse.ArgumentTypeError(f"names between commas; got {text!r}")
    return found
