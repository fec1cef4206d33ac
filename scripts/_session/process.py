"""One job: a process group with limits on time, output, files and disk, of which nothing is left behind. Imports no jax."""

import contextlib
import json
import os
import resource
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Bytes that a job may print, that one of its files may have, and that must stay free on the disk where it puts them.
MOST_OUTPUT, MOST_FILE, DISK_LEFT = 8_000_000, 2_000_000_000, 1_000_000_000
# The end of what a job said that is no result.
KEPT = 200_000
# Seconds between looks at the clock and the disk.
LOOK_SECONDS = 0.25

# "done", or how the job failed.
FAILURES = ("hung", "crashed", "garbled", "flooded", "filled the disk")


class End(NamedTuple):
    """How a job ended.

    Attributes:
        status: "done" or one of `FAILURES`.
        why: a few words; empty for "done".
        results: results that it printed.
        said: the end of everything else that it printed.
    """

    status: str
    why: str
    results: int
    said: bytes


class Limits(NamedTuple):
    """Bounds of a job: seconds, bytes printed, bytes of one file, and bytes that must stay free on the disk."""

    seconds: float
    output: int = MOST_OUTPUT
    file: int = MOST_FILE
    disk_left: int = DISK_LEFT


def run_process(
    command: Sequence[str],
    limits: Limits,
    environment: Mapping[str, str],
    folder: Path,
    on_result: Callable[[dict[str, Any]], None],
) -> End:
    """Run a command to its end, or to its limits, and end everything that it started.

    Args:
        command: program with its arguments. Each line of stdout that is an object of JSON is a result.
        limits: bounds, beyond which it is killed.
        environment: variables besides those of this process.
        folder: working directory.
        on_result: receiver of each result, as soon as it is printed.
    """
    with tempfile.TemporaryDirectory(prefix="gpu_session", ignore_cleanup_errors=True) as scratch:
        with _largest_file(limits.file):
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **environment, "TMPDIR": scratch, "TRITON_CACHE_DIR": f"{scratch}/triton"},
                start_new_session=True,
            )
        reader = _Reader(process, on_result)
        try:
            failure = _watch(reader, limits, Path(scratch))
        finally:
            _kill_group(process)
            status = process.wait()
            reader.take_rest()
            assert process.stdout is not None
            process.stdout.close()
    if failure is None and status:
        failure = "crashed", f"exit status {status}" if status > 0 else f"signal {-status}"
    elif failure is None and not reader.results:
        failure = "garbled", "it printed no result"
    return End(*(failure or ("done", "")), reader.results, reader.said)


@contextlib.contextmanager
def _largest_file(nbytes: int) -> Iterator[None]:
    """Bound the files of processes that are started inside; a limit that is set once they run may come too late."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes if hard == resource.RLIM_INFINITY else min(nbytes, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class _Reader:
    """Sorts the output of a process into results and the rest."""

    def __init__(self, process: subprocess.Popen[bytes], on_result: Callable[[dict[str, Any]], None]):
        assert process.stdout is not None
        self.file = process.stdout.fileno()
        os.set_blocking(self.file, False)
        self.process, self.on_result = process, on_result
        self.nbytes, self.results, self.said, self._line = 0, 0, b"", b""

    def take(self) -> bool:
        """Take what has been printed; whether more may come."""
        try:
            text = os.read(self.file, 65536)
        except BlockingIOError:
            return True
        self.nbytes += len(text)
        *lines, self._line = (self._line + text).split(b"\n")
        for line in lines:
            self._sort(line)
        return bool(text)

    def take_rest(self) -> None:
        """Take what is in the pipe, at most as much as a pipe holds, and the line without an end."""
        for _ in range(16):
            if not self.take():
                break
        if self._line:
            self._sort(self._line)

    def _sort(self, line: bytes) -> None:
        try:
            result = json.loads(line)
        except (ValueError, RecursionError):
            result = None
        if isinstance(result, dict):
            self.results += 1
            self.on_result(result)
        else:
            self.said = (self.said + line + b"\n")[-KEPT:]


def _watch(reader: _Reader, limits: Limits, scratch: Path) -> tuple[str, str] | None:
    """Read until the process ends; the failure, where it is to be killed."""
    end = time.monotonic() + limits.seconds
    with selectors.DefaultSelector() as selector:
        selector.register(reader.file, selectors.EVENT_READ)
        opened = True
        while reader.process.poll() is None:
            if time.monotonic() > end:
                return "hung", f"no end after {limits.seconds:g} s"
            if reader.nbytes > limits.output:
                return "flooded", f"it printed more than {limits.output:,} bytes"
            if shutil.disk_usage(scratch).free < limits.disk_left:
                return "filled the disk", f"less than {limits.disk_left:,} bytes were left"
            if not opened:
                time.sleep(LOOK_SECONDS)
            elif selector.select(LOOK_SECONDS) and not reader.take():
                selector.unregister(reader.file)
                opened = False
    return None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and all that it started; its group lasts as long as one of them does."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
