"""`OutputFile`: whole lines, each once, whatever ends the process and when.

Three files belong to a run: the output, ``.run.json`` with everything that decides it, and, while lines in the order of
the input wait for earlier ones, ``.ahead`` with those that have come before their turn.
"""

import contextlib
import errno
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from filelock import FileLock, Timeout

Order = Literal["input", "finished"]

_FORMAT = "jaxmoe batch"
_SYNC_SECONDS = 5.0
# Parts of the record that decide the output: where they differ, a run is another one.
_DECIDING = ("input", "settings", "checkpoint", "model")
# Values in them that may differ: files may be moved.
_PLACES = ("input.path", "checkpoint.path")


class OutputFile:
    """The output of one run, of which an earlier process may have done a part.

    Args:
        path: path of the output.
        record: parts that decide the output, for ``.run.json``: "input", "settings", "checkpoint" and later "model", and
            "seed", which is that of the earlier process where there was one.
        order: "input" or "finished".

    Attributes:
        done: numbers of the lines that are in the output, or ahead of their turn.
        errors: number of those that have an error.
        record: the record as it is in ``.run.json``.

    Raises:
        ValueError: the output belongs to another run, or is no output.
        RuntimeError: another process is at work on it.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], order: Order):
        self.path, self.order = path, order
        self._run, self._ahead_path = _beside(path, ".run.json"), _beside(path, ".ahead")
        self._lock = FileLock(_beside(path, ".lock"))
        self._turns: deque[int] = deque()
        self._ahead: dict[int, bytes] = {}
        self._files: list[_Appended] = []
        self._synced = time.monotonic()
        with _told(path), contextlib.ExitStack() as stack:
            # A lock would make the folder.
            if not path.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise RuntimeError(
                    f"one process writes an output; another one is at work on {path}: wait for its end, or give another name"
                ) from error
            stack.callback(self.close)
            self.done, self.errors = self._read_output()
            self.record = self._agree(record)
            self._write_record()
            self._files.append(_Appended(path))
            if order == "input":
                self._read_ahead()
                self._files.append(_Appended(self._ahead_path))
            stack.pop_all()

    def start(self, model: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Take note of the model and of what this process runs on, before the first line.

        Raises:
            ValueError: the earlier process had another model.
        """
        if self.done and "model" in self.record:
            self._refuse_other({"model": dict(model)})
        self.record = {
            **self.record,
            "model": dict(model),
            "starts": [*self.record.get("starts", []), {**environment, "lines_done_before": len(self.done)}],
        }
        with _told(self.path):
            self._write_record()

    def expect(self, number: int) -> None:
        """Say that this line comes next in the order of the input, whether it is done or not."""
        if self.order == "input" and (number not in self.done or number in self._ahead):
            self._turns.append(number)
            with _told(self.path, number):
                self._pass_on()

    def put(self, number: int, value: Mapping[str, Any]) -> None:
        """Write the output of a line: at once, or when those before it have been written.

        Raises:
            OSError: it cannot be written. What was written before is whole.
        """
        line = json.dumps({"line": number, **value}, ensure_ascii=False).encode() + b"\n"
        self.done.add(number)
        self.errors += "error" in value
        with _told(self.path, number):
            if self.order == "finished":
                self._files[0].append(line)
            else:
                self._ahead[number] = line
                if self._turns[0] != number:
                    self._files[1].append(line)
                self._pass_on()
            if time.monotonic() - self._synced > _SYNC_SECONDS:
                self._sync()

    def finish(self, totals: Mapping[str, Any]) -> None:
        """Take note of the end of the work."""
        with _told(self.path):
            self._sync()
            self.record = {**self.record, "finished": dict(totals)}
            self._write_record()
            if self.order == "input" and not self._ahead:
                self._files.pop().close()
                self._ahead_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others write."""
        for file in self._files:
            file.close()
        self._files.clear()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _pass_on(self) -> None:
        """Write the lines whose turn has come."""
        passed = False
        while self._turns and self._turns[0] in self._ahead:
            self._files[0].append(self._ahead[self._turns[0]])
            del self._ahead[self._turns.popleft()]
            passed = True
        if passed and not self._ahead and self._files[1].size:
            self._files[0].sync()
            self._files[1].empty()

    def _sync(self) -> None:
        for file in self._files:
            file.sync()
        self._synced = time.monotonic()

    def _read_output(self) -> tuple[set[int], int]:
        found = _whole_lines(self.path)
        numbers = [number for number, _, _ in found]
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{self.path} has a line twice, so it is no output of this command; give another --output")
        return set(numbers), sum(is_error for _, is_error, _ in found)

    def _read_ahead(self) -> None:
        for number, is_error, line in _whole_lines(self._ahead_path):
            if number not in self.done:
                self._ahead[number] = line
                self.errors += is_error
        self.done |= self._ahead.keys()

    def _agree(self, record: Mapping[str, Any]) -> dict[str, Any]:
        fresh = {"format": _FORMAT, "version": 1, **record}
        known = self._run.is_file()
        if not known and self.path.exists() and self.path.stat().st_size:
            raise ValueError(
                f"{self.path} is there, and {self._run.name}, which says what it is of, is not; give another --output, or "
                "remove it"
            )
        if not known or not (self.done or _whole_lines(self._ahead_path)):
            self._ahead_path.unlink(missing_ok=True)
            return fresh
        try:
            self.record = json.loads(self._run.read_text(encoding="utf-8"))
            _ = self.record["settings"], self.record["seed"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._run} is no record of a run: {error}; give another --output") from error
        self._refuse_other(record)
        return {**self.record, "input": record["input"], "checkpoint": record["checkpoint"]}

    def _refuse_other(self, record: Mapping[str, Any]) -> None:
        different = [
            f"{name} was {_brief(before)} and is {_brief(now)}"
            for part in _DECIDING
            if part in record
            for name, before, now in _differences(part, self.record.get(part), record[part])
        ]
        if different:
            raise ValueError(
                f"{self.path} has lines of another run: {'; '.join(different)}. Give the same again to go on with it, or "
                "another --output"
            )

    def _write_record(self) -> None:
        """Replace ``.run.json`` as a whole."""
        partial = _beside(self._run, ".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                json.dump(self.record, file, indent=1, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._run)
        finally:
            partial.unlink(missing_ok=True)


class _Appended:
    """A file that whole lines are added to; half a line at its end is cut off."""

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.size = _whole_size(path)
        os.ftruncate(self._file, self.size)

    def append(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self.size + written)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(line)

    def empty(self) -> None:
        os.ftruncate(self._file, 0)
        self.size = 0

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def _whole_size(path: Path) -> int:
    """Bytes up to the end of the last whole line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**16)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _whole_lines(path: Path) -> list[tuple[int, bool, bytes]]:
    """Number of each whole line, whether it has an error, and the line."""
    if not path.exists():
        return []
    found = []
    with path.open("rb") as file:
        for place, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                value = json.loads(line)
                number = value["line"]
                if type(number) is not int:
                    raise TypeError('"line" is no integer')
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is no output of this command: line {place} is no object with a number under "
                    f'"line" ({error!r:.80}); give another --output'
                ) from error
            found.append((number, "error" in value, line if path.suffix == ".ahead" else b""))
    return found


@contextlib.contextmanager
def _told(path: Path, number: int | None = None) -> Iterator[None]:
    """Name the file, the line and the way out in errors of the system."""
    try:
        yield
    except OSError as error:
        where = "" if number is None else f", at the output of line {number}"
        # It may be a file beside the output that refuses.
        other = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        raise OSError(
            error.errno,
            f"{path} cannot be written{where}: {error.strerror or error}{other}. What is there is whole: make room or see "
            "to the permissions, and give the same command again",
        ) from error


def _differences(name: str, before: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if name in _PLACES:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _differences(f"{name}.{key}", before.get(key), now.get(key))
    elif before != now:
        yield name, before, now


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
