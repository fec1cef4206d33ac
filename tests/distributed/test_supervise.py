"""The parent of a process: one line for every death, and none where the process has told by itself."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.processes import environment

BEGIN = "import os, signal, sys, time; from jaxmoe.supervise import supervise; explain_abort = supervise('process 1 of 2')\n"
ABORT = "print('native', file=os.fdopen(2, 'w'), flush=True); os.abort()"


def start(child: str, **how) -> subprocess.Popen:
    command = [sys.executable, "-c", BEGIN + child]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
    )


@pytest.mark.parametrize(
    ("child", "status", "stderr"),
    [
        ("print('own', file=sys.stderr); sys.exit(3)", 3, "own\n"),
        ("os.kill(os.getpid(), 9)", 1, "jaxmoe: process 1 of 2: error: ended by signal 9 (Killed)\n"),
        (ABORT, 1, "jaxmoe: process 1 of 2: error: ended by signal 6 (Aborted)\n"),
        (
            "explain_abort('early'); explain_abort('the others\\nare gone'); " + ABORT,
            1,
            "jaxmoe: process 1 of 2: error: the others are gone (JAX's runtime ended this process, see --debug)\n",
        ),
        ("explain_abort('early'); explain_abort(''); print('told', file=sys.stderr); " + ABORT, 1, "told\n"),
    ],
    ids=["exit", "killed", "aborted", "explained", "told"],
)
def test_one_line_for_a_death(child, status, stderr) -> None:
    process = start(child)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "", stderr)


COUNT = (
    "count = 0\ndef handler(*_):\n    global count\n    count += 1\nsignal.signal(signal.SIGINT, handler)\n"
    "print('ready', flush=True)\nwhile not count: time.sleep(0.01)\ntime.sleep(0.5)\nprint(count)\n"
)


def test_an_interrupt_at_the_terminal_comes_once() -> None:
    """A terminal sends it to the whole process group, and the parent passes on what it gets."""
    process = start(COUNT, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (out, err) == ("1\n", "")


def test_the_process_ends_with_its_parent() -> None:
    process = start("print(os.getpid(), flush=True); time.sleep(300)")
    assert process.stdout is not None
    assert process.stdout.readline() != ""
    process.kill()
    # All that hold the pipe have ended when it ends.
    assert process.communicate(timeout=60)[0] == ""
