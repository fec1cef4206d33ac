"""The file of a session's results, one line of JSON each, and the log beside it. Imports no jax."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

RESULTS, LOG, SUMMARY = "results.jsonl", "log.txt", "summary.txt"
# Files of a session: those three and tables of tiles.
MOST_FILES = 8
# Bytes that a job may leave in the log.
LOG_BYTES = 200_000


class Records:
    """Writes results so that what is written stays, whatever happens next.

    A line that the disk has no room for is kept and written with the next one; `lines` has all of them.
    """

    def __init__(self, folder: Path):
        """Make the folder.

        Args:
            folder: folder of the session, new or empty.

        Raises:
            FileExistsError: it has files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} has files: name a new folder with --out")
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        self._unwritten = b""

    def add(self, line: dict[str, Any]) -> None:
        """Append one result and wait until the disk has it."""
        self.lines.append(line)
        self._unwritten += json.dumps(line).encode() + b"\n"
        with contextlib.suppress(OSError):
            self._write()

    def _write(self) -> None:
        file = os.open(self.folder / RESULTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(file, self._unwritten) :]
            os.fsync(file)
        finally:
            os.close(file)

    def log(self, job: str, text: bytes) -> None:
        """Append the end of what a job said, if there is room for it."""
        with contextlib.suppress(OSError), (self.folder / LOG).open("ab") as file:
            file.write(f"--- {job}\n".encode() + text[-LOG_BYTES:] + b"\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a whole file, if there is room for it."""
        with contextlib.suppress(OSError):
            (self.folder / name).write_text(text)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """The results in a folder; a last line that was cut short is left out.

    Raises:
        FileNotFoundError: there are none.
    """
    file = folder / RESULTS
    if not file.exists():
        raise FileNotFoundError(f"{folder} has no {RESULTS}: name the folder of a session")
    lines = []
    for text in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                lines.append(line)
    return lines
