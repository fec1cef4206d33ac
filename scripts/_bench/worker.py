"""A side of a benchmark as a process of its own, which works only while the script waits for it."""

import json
import os
import subprocess
import sys
import time
from typing import Any

PAUSE_S = 0.3  # after each turn, for the threads of that side to go to sleep


class Worker:
    """A process of a script that has something loaded, and answers each line with a line of JSON.

    Args:
        script: path of the script.
        argv: its arguments.
    """

    def __init__(self, script: str, *argv: str):
        command = [sys.executable, script, *argv]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._receive()

    def turn(self, question: str) -> Any:
        """The answer to a line; other workers sleep meanwhile, and for a moment afterwards."""
        self.process.stdin.write(question + "\n")
        self.process.stdin.flush()
        answer = self._receive()
        time.sleep(PAUSE_S)
        return answer

    def _receive(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[2:]} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def warn_if_busy() -> None:
    """Says so where other programs are at work."""
    cpus = os.cpu_count()
    if os.getloadavg()[0] > cpus / 4:
        say(f"other programs are at work (load {os.getloadavg()[0]:.1f} on {cpus} CPUs): these figures mean little")


def say(text: str) -> None:
    """One line of what is going on, on stderr."""
    print(f"· {text}", file=sys.stderr, flush=True)
