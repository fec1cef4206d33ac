"""One process fails or dies: the others stop, soon, and say why in one line."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.processes import ROOT, finish, start

TINY = str(ROOT / "tests/goldens/mixtral/original")
GENERATE = ["--simulate", "4", "--mesh", "dp=2,tp=2,ep=2", "--failure-timeout", "4", "--max-new-tokens", "8", "--json"]


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_stops_the_other(victim, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    # A batch each: there is always one more to decode when the first has been written.
    prompts.write_text("".join(json.dumps({"prompt": [5, 6, 7]}) + "\n" for _ in range(20_000)))
    argv = ["generate", TINY, "--prompt-file", str(prompts), "--batch-size", "1", *GENERATE]
    processes = start(2, "jaxmoe", *argv)
    try:
        assert json.loads(processes[0].stdout.readline())["prompt"] == [5, 6, 7], "the first batch has been decoded"
        processes[victim].kill()
        killed = time.monotonic()
    finally:
        if processes[0].poll() is not None:
            finish(processes)
    survivor = finish(processes, timeout=180)[1 - victim]
    # The timeout of 4 s, two looks of the watchdog, and what a busy machine adds; the collective would wait for ever.
    assert time.monotonic() - killed < 150
    assert survivor.returncode == 1
    assert survivor.stderr.count("\n") == 1, survivor.stderr
    line = survivor.stderr
    assert line.startswith(f"jaxmoe: process {1 - victim} of 2: error: ")
    assert f"process {victim}" in line.partition("error: ")[2]


@pytest.mark.full
def test_an_input_error_in_one_process_ends_all_with_its_message() -> None:
    argv = ["--prompt-ids", "5,6,7", *GENERATE]
    processes = start(2, "jaxmoe", "generate", *argv, per_process={0: [TINY], 1: ["nowhere/at/all"]})
    first, second = finish(processes)
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stdout == second.stdout == ""
    (own,) = second.stderr.splitlines()
    (told,) = first.stderr.splitlines()
    assert own.startswith("jaxmoe: process 1 of 2: error: ")
    assert "nowhere/at/all" in own
    assert told == "jaxmoe: process 0 of 2: error: stopped because process 1 failed: " + own.partition("error: ")[2]


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "different"),
    [
        (["--prompt-ids", "5,6,8"], "prompts"),
        (["--max-new-tokens", "9"], "settings of generate"),
        (["--record-routing", "never-written.npz"], "recordings of routing"),
        (["--placement", "round_robin", "--dtype", "bfloat16"], "placements and settings of load"),
        (["--mesh", "dp=1,tp=2,ep=4"], "meshes"),
    ],
    ids=["prompts", "settings", "recording", "loading", "mesh"],
)
def test_other_input_in_one_process_is_refused(options, different) -> None:
    # Of an option that is given twice the last counts, but prompts add up.
    prompts = {0: ["--prompt-ids", "5,6,7"], 1: ["--prompt-ids", "5,6,7"]}
    prompts[1] = options if "--prompt-ids" in options else [*prompts[1], *options]
    refused(start(2, "jaxmoe", "generate", TINY, *GENERATE, per_process=prompts), different)


@pytest.mark.full
def test_other_weights_in_one_process_are_refused(tmp_path) -> None:
    """Of the same names and shapes; each process reads its own experts only, but all of them read the norms."""
    shutil.copytree(TINY, tmp_path / "tiny")
    path = tmp_path / "tiny/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= np.float32(1.01)
    save_file(tensors, path)
    directories = {0: [TINY], 1: [str(tmp_path / "tiny")]}
    refused(start(2, "jaxmoe", "generate", "--prompt-ids", "5,6,7", *GENERATE, per_process=directories), "weights")


def refused(processes: list, different: str) -> None:
    first, second = finish(processes)
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stdout == second.stdout == ""
    rule = f"every process is given the same input, but {different} differ between process 0 and process 1"
    assert second.stderr.startswith(f"jaxmoe: process 1 of 2: error: {rule}")
    assert first.stderr.startswith(f"jaxmoe: process 0 of 2: error: stopped because process 1 failed: {rule}")
    assert first.stderr.count("\n") == second.stderr.count("\n") == 1


@pytest.mark.full
def test_a_process_that_leaves_early_is_not_waited_for() -> None:
    first, second = finish(start(2, "tests.support.distributed_leaver"))
    assert (first.returncode, second.returncode) == (1, 1)
    rule = "process 1 has come to its end, and process 0 waits for it to do the same next"
    assert f"jaxmoe: process 0 of 2: error: {rule}" in first.stderr
    assert f"jaxmoe: process 1 of 2: error: stopped because process 0 failed: {rule}" in second.stderr


@pytest.mark.full
def test_a_coordinator_that_does_not_answer_counts_as_dead() -> None:
    """JAX's own answer would be to abort, later."""
    processes = start(2, "tests.support.distributed_leaver", "--stay")
    try:
        assert [process.stdout.readline() for process in processes] == ["joined\n"] * 2
        processes[0].send_signal(signal.SIGSTOP)
        _, err = processes[1].communicate(timeout=180)
    finally:
        for process in processes:
            process.kill()
        finish(processes)
    assert processes[1].returncode == 1
    rule = "process 0, which coordinates the others, is gone or out of reach"
    assert err == f"jaxmoe: process 1 of 2: error: {rule}\n"
