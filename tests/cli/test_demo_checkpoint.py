"""The command as a process of its own, on the checkpoint that ships with the repository."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment

DEMO = Path(__file__).parents[2] / "demo"


def run(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jaxmoe", "generate", *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=DEMO.parent, timeout=300)


@pytest.mark.full
def test_from_prompt_to_text_on_simulated_devices() -> None:
    argv = ["--prompt", "Hello", "--prompt-ids", "5"]
    assert run(str(DEMO), *argv).returncode == 2
    options = ["--max-new-tokens", "8", "--ignore-eos", "--json", "--simulate", "8", "--mesh", "dp=2,tp=2,ep=2"]
    done = run(str(DEMO), "--prompt", "Hello", "--prompt", "A much longer prompt than that", *options)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert len(first["token_ids"]) == len(second["token_ids"]) == 8
    assert isinstance(first["text"], str)
    assert done.stderr.startswith("mesh dp=2,tp=2,ep=2 on 8 cpu devices: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        pytest.param(
            (str(DEMO), "--mesh", "ep=3", "--simulate", "2"), "is 3 devices, but there are 2", marks=pytest.mark.full
        ),
        pytest.param((str(DEMO), "--mesh", "tp=7", "--simulate", "7"), "tp can be", marks=pytest.mark.full),
        pytest.param((str(DEMO), "--placement", "nowhere"), "got 'nowhere'", marks=pytest.mark.full),
        pytest.param((str(DEMO), "--max-new-tokens", "10000000"), "max_position_embeddings", marks=pytest.mark.full),
        pytest.param((str(DEMO.parent / "tests"),), "config.json does not exist", marks=pytest.mark.full),
    ],
)
def test_errors_are_one_line(argv, message) -> None:
    done = run(*argv, "--prompt", "Hello")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("jaxmoe: error: ")
    assert message in line
