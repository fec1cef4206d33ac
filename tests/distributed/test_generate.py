"""Two and four processes give the tokens of one, and each reads what its own devices hold."""

import json
import subprocess
import sys

import pytest

import jaxmoe
from tests.support import runs
from tests.support.distributed_worker import results
from tests.support.processes import ROOT, environment, finish, start
from tests.support.rounding import CASES, write_rounding

MESH = {"dp": 2, "tp": 2, "ep": 2}
MIXTRAL = str(ROOT / "tests/goldens/mixtral/original")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> list[str]:
    """A plain checkpoint; in the full run also one with a tokenizer, and one of packed weights with static scales.

    The one with a tokenizer is in Orbax arrays, of which each process reads its ranges.
    """
    if not runs.full:
        return [MIXTRAL]
    arrays = tmp_path_factory.mktemp("arrays") / "demo"
    jaxmoe.convert_to_orbax(ROOT / "demo", arrays)
    family, form, block, _ = next(case for case in CASES if case[3] == "fp8_static")
    packed, _ = write_rounding(tmp_path_factory.mktemp("packed"), family, form, block)
    return [MIXTRAL, str(arrays), str(packed)]


@pytest.fixture(scope="module")
def alone(checkpoints) -> list[dict]:
    """The results of this process, with its eight devices."""
    return [
        results(checkpoint, full=runs.full, programs=runs.full and checkpoint == MIXTRAL, **MESH)
        for checkpoint in checkpoints
    ]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.full)])
def test_tokens_and_bytes(count, checkpoints, alone) -> None:
    # Two processes see to every kind of program with plain weights, and to every kind of weights. Whatever four read is half
    # of what tp splits.
    every = runs.full and count == 2
    if count == 4:
        checkpoints, alone = checkpoints[:1], alone[:1]
    argv = [*checkpoints, "--mesh", json.dumps(MESH), "--simulate", str(8 // count), *["--full"] * every]
    ended = finish(start(count, "tests.support.distributed_worker", *argv))
    assert [process.returncode for process in ended] == [0] * count, "\n".join(process.stderr for process in ended)
    lines = [line for process in ended for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines]
    assert [process["process"] for process in found] == list(range(count))
    for process in found:
        assert process["neighbors"] == [1, 1, 1, 1], "devices along ep are of one process"
        for own, one in zip(process["results"], alone, strict=True):
            assert own["sampled"] == one["sampled"]
            if every:
                assert own["greedy"] == one["greedy"]
                assert own["continuous"] == one["continuous"]
                # Processes add in another order, and a number that lies between two of fp8 may then go either way.
                assert own["logits"] == pytest.approx(one["logits"], rel=1e-3 if one["rounded"] else 1e-4)
            assert own["bytes_read"] == own["bytes_needed"]
            assert sorted(map(int, own["expert_bytes"])) == sorted(process["local_devices"])
    for index, one in enumerate(alone):
        parts = [process["results"][index] for process in found]
        assert len({str(part["drawn"]) for part in parts}) == 1, "seeds are drawn once, for all processes"
        everywhere = [size for part in parts for size in part["expert_bytes"].values()]
        assert sorted(everywhere) == sorted(one["expert_bytes"].values())
        if count == 4:
            # Two devices along ep with one tp rank: half of what tp splits stays unread.
            assert all(part["bytes_read"] < one["bytes_read"] for part in parts)


@pytest.mark.full
def test_the_launcher_of_one_node(alone) -> None:
    command = [sys.executable, ROOT / "scripts/launch_node", "2", sys.executable, "-m", "jaxmoe", "generate"]
    argv = [MIXTRAL, "--simulate", "4", "--mesh", "dp=2,tp=2,ep=2", "--max-new-tokens", "6", "--json"]
    for prompt in ("5,6,7", "8,9", "3"):
        argv += ["--prompt-ids", prompt]
    done = subprocess.run([*command, *argv], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["token_ids"] for line in done.stdout.splitlines()] == alone[0]["greedy"]
    assert len(done.stderr.splitlines()) == 1, "process 0 alone says something"
