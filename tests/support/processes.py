"""Starting real processes on loopback."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support import runs

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(quick: bool = False) -> dict[str, str]:
    """That of the tests, without the devices that they simulate.

    In the full run it compiles as for users, unless `quick`.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    quickly = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    flags = [] if runs.full and not quick else quickly
    return kept | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)}


def start(count: int, module: str, *argv: str, per_process: dict[int, list[str]] | None = None) -> list:
    """`count` processes of ``python -m module``, told of each other; `per_process` adds arguments to some.

    Each of them compiles everything, and so quickly.
    """
    address = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", module, *argv, *(per_process or {}).get(index, [])),
                *("--coordinator", address, "--num-processes", str(count), "--process-id", str(index)),
            ],
            env=environment(quick=True),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]


def finish(processes: list, timeout: float = 300) -> list[subprocess.CompletedProcess[str]]:
    """What each wrote, and its status; none outlives this."""
    try:
        ended = []
        for process in processes:
            out, err = process.communicate(timeout=timeout)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        return ended
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
