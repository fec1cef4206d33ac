#!/usr/bin/env python3
"""Makes deliberate faults, one at a time, and tells which of them the tests notice.

The faults are in scripts/_mutations.toml. Each is made in a copy of the working tree, never in the tree itself, and the
tests run on the copy until one fails. Before all that they run without any fault, and have to pass:

1. the short run of the paths that are named with the fault,
2. the whole short run,
3. the full run (pytest --full) of the named paths,
4. with --thorough, the whole full run.

At the end: the share of all faults that the full run catches, at least 95 %, and the share of those that the short run
catches as well, at least 90 %. The status is 0 where both hold, and 1 where not. A run that goes past --limit counts as a
fault that was caught, and is told as such.

Run it with the Python of an environment that scripts/test has made, best with one of the newest Python: on an older jax
the tests of some kernels are left out. A results file has a line for every fault, so a run that was cut short goes on where
it was. Delete it once the code has changed; --only makes its faults again and replaces their lines.

    .venv/py3.13/bin/python scripts/mutate.py --results mutations.jsonl
    .venv/py3.13/bin/python scripts/mutate.py --results mutations.jsonl --only "stop string"
    .venv/py3.13/bin/python scripts/mutate.py --package dispatch --narrow
"""

import argparse
import ast
import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "scripts" / "_mutations.toml"
# It holds the table against the code, so it fails wherever a fault is made and says nothing about the fault.
OWN_TEST = "tests/test_mutate.py"

FULL_PERCENT, SHORT_PERCENT = 95, 90

PASSED, WRONG_USAGE, NOTHING_SELECTED = 0, 4, 5  # statuses of pytest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One deliberate fault, as the head of _mutations.toml explains it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def package(self) -> str:
        """The part of the repository that it is in: a package of jaxmoe, a module beside them, or "scripts"."""
        first, *rest = Path(self.file).parts
        if first != "jaxmoe":
            return first
        return rest[0].removesuffix(".py")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one fault.

    Attributes:
        name: of the fault.
        run: the smallest run that caught it, "short" or "full"; None where none did.
        test: the test that failed first; what else ended the run, where no test did.
        runs: how many runs of tests there were.
        seconds: for all runs of the fault together.
        fault: what was made, to see later whether the table has changed.
    """

    name: str
    run: str | None
    test: str | None
    runs: int
    seconds: float
    fault: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Counts over all faults, and whether they are good enough.

    Attributes:
        faults: how many there are.
        full: those that the full run catches.
        short: those that the short run catches.
        survivors: the names of those that nothing caught.
        narrow: only the short run of the paths named with a fault was there to catch it, so all are wanted.
    """

    faults: int
    full: int
    short: int
    survivors: tuple[str, ...]
    narrow: bool = False

    @classmethod
    def of(cls, results: Sequence[Result], *, narrow: bool = False) -> "Summary":
        """Whatever the short run catches, the full run catches: it has all tests of it."""
        caught = [result for result in results if result.run is not None]
        return cls(
            faults=len(results),
            full=len(caught),
            short=sum(result.run == "short" for result in caught),
            survivors=tuple(result.name for result in results if result.run is None),
            narrow=narrow,
        )

    @property
    def good(self) -> bool:
        """Whether both shares are reached; not where there is nothing to share."""
        if self.narrow:
            return self.faults > 0 and not self.survivors
        enough = 100 * self.full >= FULL_PERCENT * self.faults and 100 * self.short >= SHORT_PERCENT * self.full
        return self.faults > 0 and enough

    def __str__(self) -> str:
        if self.narrow:
            lines = [f"the short run of the paths named with them catches {_share(self.short, self.faults)}"]
        else:
            lines = [
                f"the full run catches {_share(self.full, self.faults)} (at least {FULL_PERCENT} % wanted)",
                f"the short run catches {_share(self.short, self.full)} of those (at least {SHORT_PERCENT} % wanted)",
            ]
        return "\n".join([*lines, *(f"survived: {name}" for name in self.survivors)])


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({100 * part / whole:.1f} %)" if whole else "")


# --- the table


def read_table(path: Path = TABLE) -> list[Fault]:
    """All faults, in the table's order.

    Raises:
        TypeError: an entry lacks a field, or has one that is not known.
    """
    with open(path, "rb") as file:
        entries = tomllib.load(file)["fault"]
    return [Fault(**{**entry, "tests": tuple(entry["tests"])}) for entry in entries]


def mutated(fault: Fault, source: str) -> str:
    """The source with the fault.

    Raises:
        ValueError: the old text is not there exactly once, or the new source is no Python or means the same.
    """
    if (count := source.count(fault.old)) != 1:
        raise ValueError(
            f"{fault.name!r}: the old text has to be in {fault.file} exactly once; it is there {count} times: write the "
            "same fault into the code as it is now"
        )
    result = source.replace(fault.old, fault.new)
    try:
        same = ast.dump(ast.parse(source)) == ast.dump(ast.parse(result))
    except SyntaxError as error:
        raise ValueError(f"{fault.name!r}: {fault.file} has to be Python with the fault too: {error}") from error
    if same:
        raise ValueError(f"{fault.name!r}: the new text has to mean something else than the old one in {fault.file}")
    return result


def check_table(faults: Sequence[Fault], root: Path = ROOT) -> list[str]:
    """What is wrong with the faults, a line each."""
    wrong = [f"{name!r}: a name stands for one fault" for name, n in Counter(f.name for f in faults).items() if n > 1]
    for fault in faults:
        try:
            mutated(fault, (root / fault.file).read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            wrong.append(str(error))
        if not fault.tests:
            wrong.append(f"{fault.name!r}: some tests have to be meant to notice it")
        wrong += [f"{fault.name!r}: there is no {path}" for path in fault.tests if not (root / path).exists()]
    return wrong


def select(faults: Sequence[Fault], only: Sequence[str], packages: Sequence[str]) -> list[Fault]:
    """Those whose name has one of the texts `only` in it, and whose package is one of `packages`; nothing given is all."""
    return [
        fault
        for fault in faults
        if (not only or any(text.lower() in fault.name.lower() for text in only))
        and (not packages or fault.package in packages)
    ]


# --- copies of the working tree


def copy_tree(target: Path) -> None:
    """Copy what git knows of the working tree or would add to it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    for name in filter(None, os.fsdecode(listed.stdout).split("\0")):
        if (ROOT / name).is_file():  # one that was deleted is still listed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


@contextlib.contextmanager
def made_in(tree: Path, fault: Fault) -> Iterator[None]:
    """Make the fault in a copy, and mend it afterwards."""
    file = tree / fault.file
    source = file.read_text(encoding="utf-8")
    try:
        _write_source(file, mutated(fault, source))
        yield
    finally:
        _write_source(file, source)


def _write_source(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    # Python tells a compiled file's age by whole seconds and the source's size, and neither has to differ.
    shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)


# --- running tests


@dataclasses.dataclass(frozen=True)
class Run:
    """How tests end.

    Attributes:
        status: of pytest; None where it was stopped at the limit.
        test: the first test that failed, as pytest names it; None where none is named.
        output: everything that it printed.
    """

    status: int | None
    test: str | None
    output: str

    @property
    def passed(self) -> bool:
        """Whether nothing failed; also where the run has none of the tests asked for."""
        return self.status in (PASSED, NOTHING_SELECTED)

    @property
    def cause(self) -> str:
        """What made it fail."""
        if self.status is None:
            return "(the time limit)"
        return self.test or f"(pytest ended with status {self.status})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs tests in copies of the tree.

    Attributes:
        python: the interpreter.
        workers: processes of one run.
        limit: seconds of one run.
    """

    python: str
    workers: int
    limit: float
    _running: set[int] = dataclasses.field(default_factory=set)
    _stopped: threading.Event = dataclasses.field(default_factory=threading.Event)

    def run(self, tree: Path, paths: Sequence[str], *, full: bool, to_the_end: bool = False) -> Run:
        """Run the tests under `paths`, all for none, to the first failure or to the end.

        Raises:
            RuntimeError: pytest could not run them, or `stop` was called.
        """
        command = [self.python, "-m", "pytest", "-q", "-n", str(self.workers), "--ignore", OWN_TEST]
        command += ["--full"] * full + ["-x"] * (not to_the_end) + list(paths)
        with subprocess.Popen(
            command,
            cwd=tree,
            env=environment(tree),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as process:
            self._running.add(process.pid)
            try:
                output, _ = process.communicate(timeout=self.limit)
            except subprocess.TimeoutExpired:
                return Run(None, None, "")
            finally:
                self._running.remove(process.pid)
                _kill_group(process.pid)
        if self._stopped.is_set():
            raise RuntimeError("stopped")
        if process.returncode == WRONG_USAGE:
            raise RuntimeError(f"pytest has to understand {' '.join(command)}; it said:\n{output}")
        return Run(process.returncode, first_failure(output), output)

    def stop(self) -> None:
        """End all runs. What they tell is not counted any more."""
        self._stopped.set()
        for pid in tuple(self._running):
            _kill_group(pid)

    def check(self, tree: Path) -> None:
        """Refuse an interpreter that has another jaxmoe than the copy's.

        Raises:
            RuntimeError: it has, or none at all.
        """
        found = subprocess.run(
            [self.python, "-c", "import jaxmoe; print(jaxmoe.__file__)"],
            cwd=tree,
            env=environment(tree),
            capture_output=True,
            text=True,
        )
        if not found.stdout.startswith(f"{tree}{os.sep}"):
            raise RuntimeError(
                f"{self.python} has to import jaxmoe from {tree}; it gave {found.stdout.strip() or found.stderr.strip()}: "
                "name the Python of an environment that scripts/test has made with --python"
            )


def _kill_group(pid: int) -> None:
    """End a run with its workers and what its tests have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def environment(tree: Path) -> dict[str, str]:
    """The variables of scripts/test, with the copy's jaxmoe before any that is installed, also for commands in tests."""
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".venv" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    first = {
        "PYTHONPATH": (os.pathsep, str(tree)),
        "PYTHONWARNINGS": (",", "ignore:Error reading persistent compilation cache"),
    }
    joined = {name: mark.join(filter(None, (text, os.environ.get(name)))) for name, (mark, text) in first.items()}
    return own | os.environ | joined


def first_failure(output: str) -> str | None:
    """The first test that pytest's summary names as failed, or the file that could not be collected."""
    found = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - |$)", output, re.MULTILINE)
    return found[1] if found else None


def stages(fault: Fault, *, narrow: bool, thorough: bool) -> list[tuple[str, tuple[str, ...]]]:
    """The runs that a fault meets until one fails, as "short" or "full" and the paths; no paths are all."""
    if narrow:
        return [("short", fault.tests)]
    return [("short", fault.tests), ("short", ()), ("full", fault.tests), *[("full", ())] * thorough]


def judge(runner: Runner, tree: Path, fault: Fault, *, narrow: bool, thorough: bool) -> Result:
    """Make one fault in a copy and run wider and wider, until a test fails."""
    start = time.monotonic()
    caught: tuple[str, str] | tuple[None, None] = (None, None)
    runs = 0
    with made_in(tree, fault):
        for name, paths in stages(fault, narrow=narrow, thorough=thorough):
            run = runner.run(tree, paths, full=name == "full")
            runs += 1
            if not run.passed:
                caught = (name, run.cause)
                break
    seconds = round(time.monotonic() - start, 1)
    return Result(name=fault.name, run=caught[0], test=caught[1], runs=runs, seconds=seconds, fault=_fields(fault))


def run_baseline(runner: Runner, tree: Path, faults: Sequence[Fault], *, narrow: bool, thorough: bool) -> None:
    """Run without any fault what will run with one.

    Raises:
        RuntimeError: some test fails, or there is none.
    """
    named = tuple(dict.fromkeys(path for fault in faults for path in fault.tests))
    runs = [("short", named)] if narrow else [("short", ()), ("full", () if thorough else named)]
    for name, paths in runs:
        start = time.monotonic()
        run = runner.run(tree, paths, full=name == "full", to_the_end=True)
        if run.status != PASSED:
            raise RuntimeError(
                f"tests have to pass without a fault; the {name} run ended with {run.cause}: mend that first\n"
                + "\n".join(run.output.splitlines()[-30:])
            )
        print(f"without a fault, {name} run: passed in {time.monotonic() - start:.0f} s", flush=True)


def _fields(fault: Fault) -> dict[str, object]:
    return {**dataclasses.asdict(fault), "tests": list(fault.tests)}


# --- results


def read_results(path: Path, faults: Sequence[Fault], runs: int) -> dict[str, Result]:
    """The last line about each fault that is still the one of the table, and was caught or survived so many runs.

    Raises:
        ValueError: a line is not one of a results file.
    """
    fields = {fault.name: _fields(fault) for fault in faults}
    results = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            result = Result(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, has to be a result of scripts/mutate.py: {error}") from error
        if result.fault == fields.get(result.name) and (result.run is not None or result.runs >= runs):
            results[result.name] = result
    return results


def append_result(path: Path, result: Result) -> None:
    """Add a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Make the faults that are asked for; see the head of the file."""
    args = _parser().parse_args(argv)
    faults = read_table()
    if wrong := check_table(faults):
        print("\n".join(wrong), file=sys.stderr)
        return 1
    faults = select(faults, args.only, args.package)
    if not faults:
        print("there is no such fault; --list shows all", file=sys.stderr)
        return 1
    if args.list:
        for fault in faults:
            print(f"{fault.package:12} {fault.file:50} {fault.name}")
        return 0
    runs = len(stages(faults[0], narrow=args.narrow, thorough=args.thorough))
    done = {} if args.results is None or args.only else read_results(args.results, faults, runs)
    todo = [fault for fault in faults if fault.name not in done]
    if done:
        print(f"{len(done)} of {len(faults)} faults have a line in {args.results}")
    runner = Runner(python=args.python, workers=args.workers, limit=args.limit)
    with tempfile.TemporaryDirectory(prefix="jaxmoe-mutate-") as folder:
        trees = [Path(folder).resolve() / str(job) for job in range(min(args.jobs, len(todo)))]
        for tree in trees:
            copy_tree(tree)
            runner.check(tree)
        try:
            if todo and not args.no_baseline:
                run_baseline(runner, trees[0], todo, narrow=args.narrow, thorough=args.thorough)
            done |= _judge_all(runner, trees, todo, args)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    summary = Summary.of([done[fault.name] for fault in faults], narrow=args.narrow)
    print(summary)
    return 0 if summary.good else 1


def _judge_all(
    runner: Runner, trees: Sequence[Path], faults: Sequence[Fault], args: argparse.Namespace
) -> dict[str, Result]:
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    for tree in trees:
        free.put(tree)
    results: dict[str, Result] = {}
    telling = threading.Lock()

    def one(fault: Fault) -> None:
        tree = free.get()
        try:
            result = judge(runner, tree, fault, narrow=args.narrow, thorough=args.thorough)
        finally:
            free.put(tree)
        with telling:
            results[fault.name] = result
            if args.results is not None:
                append_result(args.results, result)
            verdict = f"caught by the {result.run} run, {result.test}" if result.run else "SURVIVED"
            count = f"[{len(results)}/{len(faults)}]"
            print(f"{count} {fault.package}: {fault.name}: {verdict}, {result.seconds:.0f} s", flush=True)

    with ThreadPoolExecutor(max(1, len(trees))) as pool:
        futures = [pool.submit(one, fault) for fault in faults]
        try:
            for future in futures:
                future.result()
        except BaseException:
            runner.stop()
            pool.shutdown(cancel_futures=True)
            raise
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="show the faults and make none")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="faults with this in their name")
    parser.add_argument("--package", action="append", default=[], metavar="NAME", help="faults of this package")
    parser.add_argument("--results", type=Path, metavar="FILE.jsonl", help="a line for every fault, to go on from")
    parser.add_argument("--narrow", action="store_true", help="only the short run of the paths named with a fault")
    parser.add_argument("--thorough", action="store_true", help="end with the whole full run")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    parser.add_argument(
        "--python", default=sys.executable, metavar="PATH", help="whose tests run (the one of this script)"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time, each in its own copy (1)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one run of tests (2)")
    parser.add_argument("--limit", type=float, default=3600.0, metavar="SECONDS", help="for one run of tests (3600)")
    return parser


if __name__ == "__main__":
    # As an interrupt does, end the runs and remove the copies.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    sys.exit(main())
