"""Types of options that the benchmarks share: argparse shows what they say, and says it before anything is measured."""

import argparse
import importlib.util
from pathlib import Path

from jaxmoe.mesh import parse_mesh
from scripts._bench.cases import SHAPES, Shape, parse_shape


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """Add ``--shapes``."""
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        default=list(SHAPES.items()),
        metavar="SHAPE",
        help=f"{', '.join(SHAPES)}, or experts,per token,width,expert width (default: all)",
    )


def shape(text: str) -> tuple[str, Shape]:
    """A name and its shape."""
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def mesh(text: str) -> str:
    """Sizes of a mesh, as they are written."""
    try:
        parse_mesh(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def new_file(text: str) -> Path:
    """A file in a folder that is there."""
    file = Path(text)
    if file.is_dir() or not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"a file in a folder that exists; got {text!r}")
    return file


def picture(text: str) -> Path:
    """A file for matplotlib to write."""
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("drawing needs matplotlib, which is not installed")
    if Path(text).suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"a name that ends in .png, .pdf or .svg; got {text!r}")
    return new_file(text)
