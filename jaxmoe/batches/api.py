"""`generate_file`: a file of prompts in, a file of texts out."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxmoe.batches.output import Order
from jaxmoe.batches.progress import progress as show_progress
from jaxmoe.batches.record import environment, model_part
from jaxmoe.batches.run import Batch, BatchResult
from jaxmoe.batches.settings import LineSettings
from jaxmoe.checks import instance_of, path_like
from jaxmoe.generation.continuous import ContinuousEngine
from jaxmoe.generation.tokenizer import Tokenizer
from jaxmoe.models import Decoder
from jaxmoe.models.routing import Routing, RoutingRecorder
from jaxmoe.placement.balance import max_over_mean
from jaxmoe.placement.traffic import device_loads

# Share of what is remembered of the load of experts that a step leaves in place.
_REMEMBERED = 0.98


def generate_file(
    model: Decoder,
    input: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    settings: LineSettings | None = None,
    order: Order = "input",
    token_ids: bool = False,
    tokenizer: Tokenizer | None = None,
    num_slots: int | None = None,
    num_pages: int | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> BatchResult:
    """Generate for every line of a file, and write a line for each; started again, go on with what is missing.

    A line that is wrong gets an output with ``"error"``, and the others go on. ``OUTPUT.run.json`` has the seed, the
    settings, hashes of the input and the checkpoint, and what each start ran on.

    Args:
        model: model from `jaxmoe.load`.
        input: JSON Lines, each an object with "prompt" or "messages", settings of its own, and "id" or "metadata" that its
            output has too; or lines of OpenAI's batch format.
        output: file to write, or to go on with.
        settings: settings of lines that say nothing else.
        order: "input", or "finished" for lines as they come.
        token_ids: whether outputs have token ids beside the text.
        tokenizer: tokenizer in place of the checkpoint's.
        num_slots, num_pages, max_length: arguments as for `ContinuousEngine`.
        progress: whether stderr is told how far it is.

    Raises:
        FileNotFoundError: there is no input, or a line has text and the checkpoint no tokenizer.
        ValueError: the output is of another input, other settings or another model, or an argument is out of range.
        RuntimeError: another process is at work on the output.
        ImportError: a JSON schema is asked for, and llguidance is not installed.
        OSError: the output cannot be written.
        TypeError: an argument is something else.

    Example:
        >>> Path("prompts.jsonl").write_text('{"prompt": "def is_valid(name):", "max_tokens": 4}')
        50
        >>> result = jaxmoe.generate_file(model, "prompts.jsonl", "out.jsonl")
        >>> result.lines, result.errors
        (1, 0)
    """
    instance_of("model", model, Decoder, "a model from jaxmoe.load")
    path_like("input", input)
    path_like("output", output)
    settings = LineSettings() if settings is None else settings
    instance_of("settings", settings, LineSettings, "a jaxmoe.LineSettings")
    with Batch(
        model,
        Path(input),
        Path(output),
        settings=settings,
        order=order,
        token_ids=token_ids,
        several=model.mesh.is_multi_process,
        tokenizer=tokenizer,
    ) as batch:
        return run_batch(
            batch, model, num_slots=num_slots, num_pages=num_pages, max_length=max_length, progress=progress
        )


def run_batch(
    batch: Batch,
    model: Decoder,
    *,
    num_slots: int | None = None,
    num_pages: int | None = None,
    max_length: int | None = None,
    progress: bool = False,
) -> BatchResult:
    """Do what is missing of a run with a model; arguments and errors are those of `generate_file`."""
    engine = ContinuousEngine(model, num_slots=num_slots, num_pages=num_pages, max_length=max_length)
    batch.start(model_part(model), environment(model))
    with _loads(model, progress) as loads, show_progress(progress, batch.done_before) as report:
        return batch.run(engine, adapters=model.adapters, report=report, balance=loads.unevenness)


class _Loads(RoutingRecorder):
    """Counts of experts lately; nothing is kept of single steps."""

    def __init__(self) -> None:
        super().__init__(token_ids=False)
        self._recent_LE: np.ndarray | None = None

    def add(self, routing: Routing) -> None:
        counts_LE = np.asarray(routing.counts, np.float64)
        self._recent_LE = counts_LE if self._recent_LE is None else self._recent_LE * _REMEMBERED + counts_LE

    def unevenness(self) -> float | None:
        """Load of the busiest device over the mean, the layers' mean; None while nothing is known."""
        if self._recent_LE is None or not self.models:
            return None
        return float(np.mean(max_over_mean(device_loads(self._recent_LE, self.models[0].placements))))


@contextlib.contextmanager
def _loads(model: Decoder, wanted: bool) -> Iterator[_Loads]:
    """Record the load of experts, where somebody wants to see it and nobody else records."""
    loads = _Loads()
    if wanted and model.recorder is None and model.moe_layers:
        model.record_with(loads)
    try:
        yield loads
    finally:
        loads.stop() if loads.models else None
