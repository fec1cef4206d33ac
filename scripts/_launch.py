"""Runs the processes of a launcher together; standard library only."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

# After the first failure the others have so long to say why themselves; jaxmoe's watchdog looks every second.
GRACE_SECONDS = 5.0


def without_dashes(command: Sequence[str]) -> list[str]:
    """The command behind a ``--`` that tells where it begins, which argparse keeps in some places and drops in others."""
    return list(command[1:] if command[:1] == ["--"] else command)


def run_together(commands: Sequence[Sequence[str]], *, keep_stdin: bool = False) -> int:
    """Run the commands side by side until all have ended, or one has failed and the others were ended.

    SIGINT, SIGTERM and SIGHUP are passed on to all of them.

    Args:
        commands: each a program and its arguments.
        keep_stdin: give each a pipe as stdin that is closed when this process ends, however it ends, and not before.

    Returns:
        0 if all ended well, else the exit status of the first that failed (128 + signal for one that was killed).
    """
    stdin = subprocess.PIPE if keep_stdin else subprocess.DEVNULL
    children: list[subprocess.Popen] = []
    stopping = 0

    def pass_on(signum: int, frame: FrameType | None) -> None:
        nonlocal stopping
        del frame
        stopping = stopping or signum
        for child in children:
            child.send_signal(signum)

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, pass_on)
    status = 0
    try:
        for command in commands:
            children.append(subprocess.Popen(command, stdin=stdin, start_new_session=True))
        while not status and any(child.poll() is None for child in children):
            if stopping:
                status = 128 + stopping
            for child in children:
                status = status or _exit_status(child.poll())
            time.sleep(0.05)
        status = status or next(filter(None, (_exit_status(child.returncode) for child in children)), 0)
    except OSError as error:
        print(f"cannot start {shlex.join(commands[len(children)])}: {error}", file=sys.stderr)
        status = 127
    finally:
        _end(children)
    return status


def _exit_status(returncode: int | None) -> int:
    """As a shell gives it; 0 for a process that still runs."""
    if returncode is None:
        return 0
    return 128 - returncode if returncode < 0 else returncode


def _end(children: Sequence[subprocess.Popen]) -> None:
    """Wait for children that are about to end, and end those that are not: kindly, then not."""
    for ask in (lambda child: None, subprocess.Popen.terminate, subprocess.Popen.kill):
        for child in children:
            if child.poll() is None:
                ask(child)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and any(child.poll() is None for child in children):
            time.sleep(0.05)
