"""The status of commands that run together, where one ends by a signal of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = (
    "import sys; from _launch import run_together; "
    "sys.exit(run_together([[sys.executable, '-c', command] for command in sys.argv[1:]]))"
)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("commands", "status"),
    [
        (["import os; os.kill(os.getpid(), 9)", "import time; time.sleep(60)"], 137),
        (["pass", "import sys; sys.exit(3)"], 3),
        (["pass", "pass"], 0),
    ],
)
def test_a_killed_command_has_the_status_that_a_shell_gives(commands, status):
    done = subprocess.run([sys.executable, "-c", RUN, *commands], cwd=ROOT / "scripts", timeout=60)
    assert done.returncode == status
