"""Options of a command that several processes may run together, and the steps that they stand for."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from jaxmoe.cli import options


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that several processes may run together."""
    group = parser.add_argument_group("several processes")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num-processes", type=options.count, metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument(
        "--distributed", action="store_true", help="take the three from the cluster: SLURM, Open MPI, Kubernetes"
    )
    group.add_argument(
        "--failure-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="stop when another process gives no sign of life for so long (60)",
    )


def is_one_of_several(args: argparse.Namespace) -> bool:
    """Whether the options of `add_options` ask for several processes; wrong usage where they are incomplete."""
    given = [value is not None for value in (args.coordinator, args.num_processes, args.process_id)]
    if any(given) and (args.distributed or not all(given)):
        args.usage_error("--coordinator, --num-processes and --process-id go together, or --distributed alone")
    return args.distributed or all(given)


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Run the ``with`` block as one of several processes, where the options ask for it.

    Only process 0 writes to stdout and stderr. An error in any ends all of them with status 1, each
    having said why in one line.
    """
    if not is_one_of_several(args):
        yield
        return
    from jaxmoe.supervise import supervise

    number = "this process" if args.process_id is None else f"process {args.process_id} of {args.num_processes}"
    explain_abort = supervise(number, show_native=args.debug)
    from jaxmoe import distributed

    # Joining waits in native code, where Python's own handler of an interrupt would not be run.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    distributed.initialize(
        args.coordinator,
        args.num_processes,
        args.process_id,
        failure_timeout=args.failure_timeout,
        explain_abort=explain_abort,
    )
    signal.signal(signal.SIGINT, interrupt)
    with contextlib.ExitStack() as silence:
        if not distributed.is_first():
            nothing = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nothing))
            silence.enter_context(contextlib.redirect_stderr(nothing))
        try:
            yield
            sys.stdout.flush()
            distributed.finish()
        except (Exception, KeyboardInterrupt) as error:
            distributed.fail(error, show_traceback=args.debug)
