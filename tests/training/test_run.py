"""Runs that are cut short and go on, their log and their settings."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scripts._train.corpus import Batches
from scripts._train.run import Run, train
from scripts._train.step import Trainer
from tests.support.meshes import mesh_of
from tests.support.processes import environment
from tests.support.tiny_training import RECIPE, tiny_model, tiny_text

ROOT = Path(__file__).parents[2]
SETTINGS = {"seed": 0, "steps": RECIPE.steps}


class CutShort(Exception):
    pass


class Faulty(Batches):
    """Batches of which one cannot be had."""

    fault = 17

    def __getitem__(self, step: int) -> np.ndarray:
        if step == self.fault:
            raise CutShort
        return super().__getitem__(step)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    return Trainer(tiny_model(tmp_path_factory.mktemp("model"), mesh_of(2, 2, 2)), RECIPE)


def losses(run: Run) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in run.log() if "loss" in record]


def start(directory: Path, trainer: Trainer, batches: Batches, *, checkpoint_minutes: float = 0) -> Run:
    _, held_out = tiny_text()
    with Run(directory, SETTINGS) as run:
        train(run, trainer, batches, held_out, checkpoint_minutes=checkpoint_minutes, quiet=True)
    return run


@pytest.mark.full
def test_a_run_cut_short_goes_on_to_the_same_losses_and_weights(tmp_path, trainer):
    batches, _ = tiny_text()
    whole = start(tmp_path / "whole", trainer, batches, checkpoint_minutes=60)
    faulty = Faulty(batches.stream, length=RECIPE.length, rows=RECIPE.rows, seed=0)
    with pytest.raises(CutShort):
        start(tmp_path / "cut", trainer, faulty)
    with Run(tmp_path / "cut", SETTINGS) as cut:
        newest = cut.checkpoints.latest_step()
    assert 0 < newest <= Faulty.fault
    with cut.log_file.open("a") as file:
        file.write('{"step": 20, "loss": 1.0}\n{"step": 30, "lo')  # logged after the checkpoint, the last line in part
    cut = start(tmp_path / "cut", trainer, batches)
    assert [step for step, _ in losses(cut)] == [step for step, _ in losses(whole)] == [10, 20, 30]
    # A window that the cut fell into counts the steps after it only.
    assert losses(cut)[-1][1] == pytest.approx(losses(whole)[-1][1], rel=1e-5)

    states = []
    for name in ("whole", "cut"):
        with Run(tmp_path / name, SETTINGS) as run:
            states.append(run.restore(trainer.init()))
    assert [int(state.step) for state in states] == [RECIPE.steps] * 2
    for path, param in states[0].params.items():
        np.testing.assert_allclose(states[1].params[path], param, atol=1e-6, err_msg=path)


SCRIPT = """
import sys
from pathlib import Path
import jaxmoe
jaxmoe.simulate_devices(8)
from scripts._train.run import Run, train
from scripts._train.step import Trainer
from tests.support.processes import environment
from tests.support.tiny_training import RECIPE, tiny_model, tiny_text
directory = Path(sys.argv[1])
batches, held_out = tiny_text()
trainer = Trainer(tiny_model(directory / "model", jaxmoe.make_mesh(dp=2, tp=2, ep=2)), RECIPE)
with Run(directory, {"seed": 0, "steps": RECIPE.steps}) as run:
    train(run, trainer, batches, held_out, checkpoint_minutes=0, quiet=True)
"""


@pytest.mark.full
def test_a_process_killed_in_the_middle_leaves_a_run_that_goes_on(tmp_path, trainer):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, env=environment())
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "log.jsonl").exists() or not (tmp_path / "log.jsonl").read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    batches, _ = tiny_text()
    run = start(tmp_path, trainer, batches)
    assert losses(run)[-1][0] == RECIPE.steps
    assert losses(run)[-1][1] < 4


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    with Run(tmp_path, SETTINGS):
        pass
    with Run(tmp_path, dict(SETTINGS)):
        pass
    with pytest.raises(ValueError, match=r"seed was 0 and is 1; name another directory with --run"):
        Run(tmp_path, SETTINGS | {"seed": 1})


@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "50"], "warms up for 100 steps; got steps=50"),
        (["--mesh", "pp=2"], "a mesh is written dp=1,tp=2,ep=4"),
        (["--mesh", "dp=3"], "a batch of 16 rows is split evenly over dp and ep; got --mesh dp=3"),
        (["--checkpoint-minutes", "nan"], "--checkpoint-minutes is a number of at least 0; got nan"),
    ],
)
def test_wrong_arguments_are_told_in_a_line(tmp_path, words, message):
    command = [
        sys.executable,
        ROOT / "scripts/train_demo.py",
        "--run",
        tmp_path / "run",
        "--out",
        tmp_path / "out",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.full
def test_a_finished_run_is_left_as_it_is(tmp_path, trainer):
    batches, _ = tiny_text()
    before = losses(start(tmp_path, trainer, batches, checkpoint_minutes=60))
    assert losses(start(tmp_path, trainer, Faulty(batches.stream, length=24, rows=8, seed=0))) == before


@pytest.mark.full
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, trainer, monkeypatch):
    monkeypatch.setattr(trainer, "init", lambda init=trainer.init: poisoned(init()))
    batches, _ = tiny_text()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 10; lower the learning rate"):
        start(tmp_path, trainer, batches)


def poisoned(state):
    return state._replace(params={path: param * np.nan for path, param in state.params.items()})


@pytest.mark.full
def test_every_line_of_the_log_is_a_record(tmp_path, trainer):
    batches, _ = tiny_text()
    run = start(tmp_path, trainer, batches, checkpoint_minutes=60)
    records = [json.loads(line) for line in run.log_file.read_text().splitlines()]
    assert [record["step"] for record in records] == [10, 20, 30, 30]
    assert all(record["tokens_per_second"] > 0 and len(record["load"]) == 2 for record in records[:3])
    # The steps' own loss is the mean of ten, and of other rows.
    assert records[3]["held_out_loss"] == pytest.approx(records[2]["loss"], rel=0.2)
