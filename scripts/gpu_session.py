#!/usr/bin/env python3
"""Ten minutes on a GPU that nobody has tried: whether the kernels are right there, how fast they are, and with which tiles.

It starts job after job, each a process group of its own with a time limit, and writes every result at once to results.jsonl
in the folder of the session. A job that hangs, crashes or fills the disk loses itself and its kernel, which later jobs do
without; then a small product tests that the GPU still works. A job that does not fit into the time that is left is left out
by name. The summary comes last, and again by --summary. It needs jax and Flax in the Python that runs it, no network and no
environment of its own; what else is missing is left out by name. So far it has run with --tiny on CPUs only.

    scripts/gpu_session
    scripts/gpu_session --gpus 8
    scripts/gpu_session --minutes 5 --out results/tonight
    scripts/gpu_session --summary results/tonight
    scripts/gpu_session --tiny --out /tmp/tiny
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts._session.plan import gpu_jobs, tiny_jobs
from scripts._session.records import SUMMARY, Records, read_results
from scripts._session.session import Session, default_folder, device_name
from scripts._session.summary import summarize

MINUTES = 8.95


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, run the jobs, print the summary."""
    args = parse_arguments(argv)
    if args.summary:
        try:
            print(summarize(read_results(args.summary)))
        except OSError as error:
            raise SystemExit(f"gpu_session: {error}") from error
        return
    try:
        records = Records(args.out or default_folder("cpu" if args.tiny else device_name()))
    except OSError as error:
        raise SystemExit(f"gpu_session: {error}") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = tiny_jobs(args.gpus) if args.tiny else gpu_jobs(args.gpus)
    if args.jobs:
        jobs = [job for job in jobs if job.needed or any(part in job.name for part in args.jobs)]
    try:
        Session(records, seconds=args.minutes * 60, tiny=args.tiny, gpus=args.gpus).run(jobs)
    except KeyboardInterrupt:
        records.add({"job": "session", "status": "ended", "why": "it was interrupted"})
    text = summarize(records.lines)
    records.write_text(SUMMARY, text + "\n")
    print(f"\n{text}\n\nresults are in {records.folder}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="new folder for the results (default: results/<date>-<device>)")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"time for everything (default: {MINUTES})")
    parser.add_argument("--jobs", nargs="+", metavar="WORDS", help="only jobs whose names have one of these in them")
    parser.add_argument("--tiny", "--dry-run", action="store_true", help="tiny sizes on a CPU, to test the session")
    parser.add_argument("--summary", type=Path, metavar="FOLDER", help="only print the summary of that session")
    parser.add_argument(
        "--gpus",
        type=int,
        default=1,
        metavar="N",
        help="with more than one: collectives and dispatches over so many (1)",
    )
    args = parser.parse_args(argv)
    if args.gpus < 1:
        parser.error(f"--gpus is a number of GPUs of at least 1; got {args.gpus}")
    return args


if __name__ == "__main__":
    main()
