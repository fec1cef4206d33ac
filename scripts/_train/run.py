"""The training loop: checkpoints by time, a log that goes on where it stopped, progress."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scripts._train.corpus import Batches
from scripts._train.step import Metrics, Trainer, TrainState

# Steps between two looks at the metrics: a look waits for the device.
LOG_EVERY = 10
EVALUATE_EVERY = 250
# Batches of held-out text in an evaluation during training; the one at the end takes all of it.
EVALUATION_BATCHES = 4


class HeldOut(NamedTuple):
    """Held-out text as `corpus.windows` cuts it."""

    rows: np.ndarray
    lengths: np.ndarray


class Run:
    """A training run in a directory: its settings, its newest checkpoint and its log; a context that closes them.

    Args:
        directory: made where it is missing.
        settings: everything that the result depends on; a run goes on only with those it began with.

    Raises:
        ValueError: the directory holds a run with other settings.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self.directory = directory.absolute()
        self.log_file = self.directory / "log.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        self._check_settings(settings)
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True)
        self.checkpoints = ocp.CheckpointManager(self.directory / "checkpoints", options=options)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.checkpoints.close()

    def _check_settings(self, settings: dict[str, Any]) -> None:
        file = self.directory / "settings.json"
        if not file.exists():
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            partial.replace(file)
            return
        begun = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
        if changed:
            values = ", ".join(f"{name} was {begun.get(name)!r} and is {settings.get(name)!r}" for name in changed)
            raise ValueError(
                f"a run goes on with the settings it began with: in {self.directory} {values}; name another directory "
                "with --run, or delete this one"
            )

    def restore(self, fresh: TrainState) -> TrainState:
        """The newest checkpoint, laid out on the mesh as `fresh` is; `fresh` itself where there is none."""
        step = self.checkpoints.latest_step()
        if step is None:
            self._write_log([])
            return fresh
        like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), fresh)
        state = self.checkpoints.restore(step, args=ocp.args.StandardRestore(like))
        # What was logged after the checkpoint is done, and logged, again.
        self._write_log([record for record in self.log() if record["step"] <= step])
        return state

    def save(self, state: TrainState) -> None:
        """Start writing a checkpoint; it counts once it is whole."""
        self.checkpoints.save(int(state.step), args=ocp.args.StandardSave(state))

    def log(self) -> list[dict[str, Any]]:
        """What was logged so far; a line that a kill cut short is left out."""
        if not self.log_file.exists():
            return []
        lines = self.log_file.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def append(self, record: dict[str, Any]) -> None:
        """Log one line."""
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _write_log(self, records: list[dict[str, Any]]) -> None:
        partial = self.log_file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        partial.replace(self.log_file)


def train(
    run: Run, trainer: Trainer, batches: Batches, held_out: HeldOut, *, checkpoint_minutes: float, quiet: bool = False
) -> TrainState:
    """Train from the newest checkpoint to the last step of the recipe.

    Args:
        run: where checkpoints and log are.
        trainer: the compiled step.
        batches: what is trained on.
        held_out: what is evaluated on now and then.
        checkpoint_minutes: between two checkpoints; what a kill loses at most.
        quiet: draw no progress bar.
    """
    recipe = trainer.recipe
    state = run.restore(trainer.init())
    first = int(state.step)
    tokens_per_step = recipe.rows * recipe.length
    pending: list[Metrics] = []
    logged = saved = time.monotonic()
    with _progress(first, recipe.steps, quiet) as show:
        for step in range(first, recipe.steps):
            state, metrics = trainer.step(state, trainer.shard(batches[step]))
            pending.append(metrics)
            done = step + 1
            if done % LOG_EVERY == 0 or done == recipe.steps:
                record = {"step": done, **summarize(jax.device_get(pending))}
                now = time.monotonic()
                record["tokens_per_second"] = round(tokens_per_step * len(pending) / (now - logged))
                if not math.isfinite(record["loss"]):
                    raise FloatingPointError(f"the loss is {record['loss']} at step {done}; lower the learning rate")
                run.append(record)
                show(done, record)
                pending, logged = [], now
            if done % EVALUATE_EVERY == 0 or done == recipe.steps:
                nats, _ = evaluate(trainer, state, held_out, limit=EVALUATION_BATCHES)
                run.append({"step": done, "held_out_loss": nats})
                logged = time.monotonic()
            if time.monotonic() - saved > checkpoint_minutes * 60:
                run.save(state)
                saved = time.monotonic()
    if run.checkpoints.latest_step() != recipe.steps:
        run.save(state)
    run.checkpoints.wait_until_finished()
    return state


def evaluate(
    trainer: Trainer, state: TrainState, held_out: HeldOut, *, limit: int | None = None
) -> tuple[float, np.ndarray]:
    """Mean cross-entropy in nats per token, and the experts' counts int64 [L, E], over the first `limit` batches."""
    rows = trainer.recipe.rows
    total, tokens, counts_LE = 0.0, 0, np.zeros((), np.int64)
    for start in list(range(0, len(held_out.rows), rows))[:limit]:
        part, lengths = held_out.rows[start : start + rows], held_out.lengths[start : start + rows]
        missing = rows - len(part)
        part, lengths = np.pad(part, ((0, missing), (0, 0))), np.pad(lengths, (0, missing))
        nats, counts = trainer.evaluate(state.params, trainer.shard(part), trainer.shard(lengths))
        total, tokens, counts_LE = total + float(nats), tokens + int(lengths.sum()), counts_LE + np.asarray(counts)
    return total / tokens, counts_LE


def summarize(metrics: list[Metrics]) -> dict[str, Any]:
    """Means over some steps; `load` is the busiest expert's share over the mean share, by layer."""
    counts_LE = np.sum([m.expert_counts for m in metrics], axis=0)
    return {
        "loss": round(float(np.mean([m.loss for m in metrics])), 5),
        "balance": round(float(np.mean([m.balance for m in metrics])), 4),
        "z": round(float(np.mean([m.z for m in metrics])), 4),
        "gradient_norm": round(float(np.mean([m.gradient_norm for m in metrics])), 4),
        "load": [round(float(load), 3) for load in counts_LE.max(axis=1) / counts_LE.mean(axis=1)],
        "unused_experts": int((counts_LE == 0).sum()),
    }


@contextmanager
def _progress(first: int, steps: int, quiet: bool) -> Iterator[Any]:
    """A function of step and record that moves a bar with loss, tokens/s and the time left."""
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=quiet, speed_estimate_period=300) as progress:
        task = progress.add_task("training", total=steps, completed=first, loss=math.nan, rate=0)

        def show(done: int, record: dict[str, Any]) -> None:
            progress.update(task, completed=done, loss=record["loss"], rate=record["tokens_per_second"])

        yield show
