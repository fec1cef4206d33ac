"""One process fails or dies: the others stop, soon, and say why in one line."""

import json
import time

import pytest

from tests.distributed.processes import ROOT, finish, start

pytestmark = pytest.mark.slow

DEMO = str(ROOT / "demo")
GENERATE = ["--simulate", "4", "--mesh", "dp=2,tp=2,ep=2", "--failure-timeout", "4", "--max-new-tokens", "8", "--json"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_other(victim, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    # A batch each: there is always one more to decode when the first has been written.
    prompts.write_text("".join(json.dumps({"prompt": [5, 6, 7]}) + "\n" for _ in range(20_000)))
    argv = ["generate", DEMO, "--prompt-file", str(prompts), "--batch-size", "1", *GENERATE]
    processes = start(2, "jaxmoe", *argv)
    try:
        assert json.loads(processes[0].stdout.readline())["prompt"] == [5, 6, 7], "the first batch has been decoded"
        processes[victim].kill()
        killed = time.monotonic()
    finally:
        if processes[0].poll() is not None:
            finish(processes)
    survivor = finish(processes, timeout=60)[1 - victim]
    # The timeout of 4 s, two looks of the watchdog, and what a busy machine adds; the collective would wait for ever.
    assert time.monotonic() - killed < 45
    assert survivor.returncode == 1
    assert survivor.stderr.count("\n") == 1, survivor.stderr
    line = survivor.stderr
    assert line.startswith(f"jaxmoe: process {1 - victim} of 2: error: ")
    assert f"process {victim}" in line.partition("error: ")[2]


def test_an_input_error_in_one_process_ends_all_with_its_message() -> None:
    argv = ["--prompt-ids", "5,6,7", *GENERATE]
    processes = start(2, "jaxmoe", "generate", *argv, per_process={0: [DEMO], 1: ["nowhere/at/all"]})
    first, second = finish(processes)
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stdout == second.stdout == ""
    (own,) = second.stderr.splitlines()
    (told,) = first.stderr.splitlines()
    assert own.startswith("jaxmoe: process 1 of 2: error: ")
    assert "nowhere/at/all" in own
    assert told == "jaxmoe: process 0 of 2: error: stopped because process 1 failed: " + own.partition("error: ")[2]


def test_other_prompts_in_one_process_are_refused() -> None:
    ids = {0: ["--prompt-ids", "5,6,7"], 1: ["--prompt-ids", "5,6,8"]}
    first, second = finish(start(2, "jaxmoe", "generate", DEMO, *GENERATE, per_process=ids))
    assert (first.returncode, second.returncode) == (1, 1)
    assert "differ between process 0 and process 1" in second.stderr
    assert "process 1 failed" in first.stderr
