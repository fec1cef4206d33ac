"""The parser of the whole command line, and what becomes of an error.

A subcommand is a module that is a `Command`, and a line in `COMMANDS`. No module here imports anything heavy before
the arguments are read, so that ``--help`` is quick and ``--simulate`` can still choose the devices.
"""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

from jaxmoe.cli import bench, convert, generate, inspect, place, plan, serve, tune, warm

# Errors in the input. Anything else is a bug in jaxmoe and keeps its traceback.
_INPUT_ERRORS = (ValueError, OSError, RuntimeError, ImportError)


class Command(Protocol):
    """The contract of a subcommand, which its module fulfills.

    Attributes:
        HELP: its line in ``jaxmoe --help``.
    """

    HELP: str

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the subcommand's options to its parser."""

    def run(self, args: argparse.Namespace) -> None:
        """Do the work; results go to stdout. Besides the options, `args` has ``usage_error(message)``, which exits with 2.

        Raises:
            ValueError, OSError, RuntimeError, ImportError: the input is wrong; the message is shown as one line.
        """


COMMANDS: dict[str, Command] = {
    "generate": generate,
    "serve": serve,
    "warm": warm,
    "inspect": inspect,
    "convert": convert,
    "plan": plan,
    "place": place,
    "bench": bench,
    "tune": tune,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, or 1 for an error in the input, which is told in one line on stderr.

    Raises:
        SystemExit: with status 2 for wrong usage, 0 for ``--help`` and ``--version``.
    """
    with _rare_collections():
        return _main(argv)


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the garbage collector look seldom: imports and tracing make many objects that stay, a sixth of a start's time.

    A start that finds its programs kept makes 350,000 of them.
    """
    before = gc.get_threshold()
    gc.set_threshold(500_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _main(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader has left (`| head`). Python flushes stdout once more at exit, into nothing then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except _INPUT_ERRORS as error:
        if args.debug:
            raise
        print(f"jaxmoe: error: {_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    from jaxmoe import __version__

    parser = argparse.ArgumentParser(
        prog="jaxmoe",
        description="Torch Mixture-of-Experts checkpoints on a (dp, tp, ep) mesh, with JAX.",
        epilog="`jaxmoe COMMAND --help` tells the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"jaxmoe {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.HELP, description=f"{command.HELP}.")
        command.add_options(subparser)
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        subparser.set_defaults(run=command.run, usage_error=subparser.error)
    return parser


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
