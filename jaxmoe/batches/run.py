"""`Batch`: one run over an input file, from the first check to the last line."""

import dataclasses
import functools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import jax
import numpy as np

from jaxmoe.batches.lines import LineError, RawLine, raw_lines, read_line
from jaxmoe.batches.output import Order, OutputFile
from jaxmoe.batches.progress import Report, State
from jaxmoe.batches.record import checkpoint_part, input_part
from jaxmoe.batches.settings import LineSettings
from jaxmoe.batches.texts import Encoder, Sample
from jaxmoe.checks import one_of
from jaxmoe.distributed import broadcast, check_same
from jaxmoe.generation.json_schema import require_llguidance
from jaxmoe.generation.model import Outline
from jaxmoe.generation.requests import EngineCounts, Request, TokenResult
from jaxmoe.generation.tokenizer import Tokenizer

# Lines between the first that is not done and the last that was begun, where the order of the input is kept: their
# outputs wait in memory.
WINDOW = 10_000
# Errors that are of a line: its own, and those that a chat template makes of it.
_LINE_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError)


class Engine(Protocol):
    """Part of `ContinuousEngine` that a run needs."""

    def submit(self, request: Request) -> int:
        """Let a request wait for its turn."""
        ...

    def cancel(self, request_id: int) -> None:
        """End a request."""
        ...

    def step(self) -> list[TokenResult]:
        """Run one step."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        ...

    @property
    def counts(self) -> EngineCounts:
        """Counts of requests and slots."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchResult:
    """Counts of a run.

    Attributes:
        lines: lines of the input that are not blank; the output has one for each.
        done_before: lines among them that were in the output already.
        errors: lines of the output that have an error.
        generated_tokens: tokens that this process has generated.
        seconds: time from the first line to the last.
    """

    lines: int
    done_before: int
    errors: int
    generated_tokens: int
    seconds: float


@dataclasses.dataclass
class _Open:
    """A line under way."""

    number: int
    carried: dict[str, Any]
    samples: list[Sample]
    left: int


class Batch:
    """A run over an input file; as a context manager it holds the output until the block ends.

    What can be refused is refused here, before weights are read: another run's output, one that cannot be written, one
    that another process writes.

    Args:
        outline: config and source of the model.
        input: path of the file of prompts.
        output: path of the output.
        settings: settings of lines that say nothing else.
        order: "input", or "finished" for lines as they come.
        token_ids: whether outputs have token ids beside the text.
        several: whether several processes run this together, of which the first writes.
        tokenizer: tokenizer in place of the checkpoint's.

    Raises:
        FileNotFoundError: there is no input.
        ValueError: the input is empty, the output is of another run, or processes were given different input.
        RuntimeError: another process is at work on the output.
        ImportError: a JSON schema is asked for, and llguidance is not installed.
        OSError: the output cannot be written.
    """

    def __init__(
        self,
        outline: Outline,
        input: Path,
        output: Path,
        *,
        settings: LineSettings,
        order: Order = "input",
        token_ids: bool = False,
        several: bool = False,
        tokenizer: Tokenizer | None = None,
    ):
        one_of("order", order, ("input", "finished"))
        if settings.schema is not None:
            require_llguidance()
        if input.resolve() == output.resolve():
            raise ValueError(f"output is another file than input; got {output} for both")
        self._outline, self._tokenizer, self._token_ids = outline, tokenizer, token_ids
        self._input, self._settings, self._order = input, settings, order
        read = input_part(input)
        record = {
            "input": read,
            "settings": {**settings.to_json(), "order": order, "token_ids": token_ids},
            "checkpoint": checkpoint_part(outline.source),
        }
        self._hash = read["sha256"]
        self.total = sum(1 for _ in raw_lines(input))
        if not self.total:
            raise ValueError(f"an input file has an object with a prompt on every line; {input} has none")
        if several:
            check_same({name: {**(part or {}), "path": None} for name, part in record.items()})
        self._output: OutputFile | None = None
        if not several or jax.process_index() == 0:
            self._output = OutputFile(output, {**record, "seed": secrets.randbits(64)}, order)
        try:
            self._seed, self._done = self._progress_of_all(several)
        except BaseException:
            self.__exit__()
            raise
        self.done_before = self._num_done = len(self._done)
        self._errors = 0 if self._output is None else self._output.errors
        self._lines: dict[int, _Open] = {}  # by their place in the input
        self._owners: dict[int, tuple[int, Sample]] = {}
        self._place = 0  # of the line that was begun last

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._output is not None:
            self._output.close()

    def start(self, model: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Write into the record which model is used, and on what.

        Raises:
            ValueError: an earlier process had another model.
        """
        if self._output is not None:
            self._output.start(model, environment)

    def run(
        self,
        engine: Engine,
        *,
        adapters: tuple[str, ...] = (),
        report: Report = lambda read_state: None,
        balance: Callable[[], float | None] = lambda: None,
    ) -> BatchResult:
        """Do every line that is not done.

        Args:
            engine: engine of the model, with nothing to do.
            adapters: names of adapters that the model holds.
            report: function that is called after every step with one that gives the state.
            balance: function that gives the load of the busiest device over the mean.

        Raises:
            OSError: the output cannot be written on.
            ValueError: the input is being changed.
            FileNotFoundError: a line has text, and there is no tokenizer.
            ImportError: a line has a JSON schema, and llguidance is not installed.
        """
        begin = time.perf_counter()
        encoder = Encoder(self._outline, self._tokenizer, adapters)
        todo = self._todo()
        tokens = 0
        while True:
            while self._has_room(engine) and (following := next(todo, None)) is not None:
                self._begin(*following, encoder, engine)
            if not engine.has_work:
                break
            results = [result for result in engine.step() if result.request_id in self._owners]
            tokens += len(results)
            for result in results:
                self._take(result, encoder, engine)
            report(functools.partial(self._state, engine, tokens, balance))
        return self._finish(tokens, time.perf_counter() - begin)

    def _state(self, engine: Engine, tokens: int, balance: Callable[[], float | None]) -> State:
        counts = engine.counts
        return State(self._num_done, self.total, self._errors, tokens, counts.running, counts.slots, balance())

    def _has_room(self, engine: Engine) -> bool:
        """Whether the next line may begin: enough wait for the next free slots, none too far behind."""
        counts = engine.counts
        if counts.waiting >= counts.slots:
            return False
        return self._order == "finished" or not self._lines or self._place - next(iter(self._lines)) < WINDOW

    def _todo(self) -> Iterator[tuple[int, RawLine]]:
        """Lines that are not done, each with its place; the others are passed by."""
        for place, raw in enumerate(raw_lines(self._input)):
            if self._output is not None:
                self._output.expect(raw.number)
            if raw.number not in self._done:
                yield place, raw

    def _begin(self, place: int, raw: RawLine, encoder: Encoder, engine: Engine) -> None:
        """Submit a line, or write its error."""
        self._place = place
        carried: dict[str, Any] = {}
        ids: list[int] = []
        try:
            line = read_line(raw.text, self._settings)
            carried = line.carried
            samples = encoder.requests(line, self._seed, raw.number)
            for sample in samples:
                ids.append(engine.submit(sample.request))
        except _LINE_ERRORS as error:
            for id in ids:
                engine.cancel(id)
            carried = error.carried if isinstance(error, LineError) else carried
            message = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            self._put(raw.number, {**carried, "error": {"message": message}})
            return
        self._lines[place] = _Open(raw.number, carried, samples, len(samples))
        self._owners.update({id: (place, sample) for id, sample in zip(ids, samples, strict=True)})

    def _take(self, result: TokenResult, encoder: Encoder, engine: Engine) -> None:
        """Add a token to its text, and write the line where it was the last of its texts."""
        place, sample = self._owners[result.request_id]
        if sample.take(result):
            engine.cancel(result.request_id)
        if sample.finish_reason is None:
            return
        del self._owners[result.request_id]
        line = self._lines[place]
        line.left -= 1
        if not line.left:
            del self._lines[place]
            self._put(line.number, {**line.carried, **encoder.value(line.samples, token_ids=self._token_ids)})

    def _put(self, number: int, value: Mapping[str, Any]) -> None:
        self._num_done += 1
        self._errors += "error" in value
        if self._output is not None:
            self._output.put(number, value)

    def _finish(self, tokens: int, seconds: float) -> BatchResult:
        if input_part(self._input)["sha256"] != self._hash:
            raise ValueError(f"the input stays as it is while it is read; {self._input} was changed during the run")
        if self._output is not None:
            self._output.finish({"lines": self.total, "errors": self._errors})
        return BatchResult(
            lines=self.total,
            done_before=self.done_before,
            errors=self._errors,
            generated_tokens=tokens,
            seconds=seconds,
        )

    def _progress_of_all(self, several: bool) -> tuple[int, set[int]]:
        """The seed and the lines that are done, which the first process knows."""
        seed = 0 if self._output is None else int(self._output.record["seed"])
        done = set() if self._output is None else set(self._output.done)
        numbers = [raw.number for raw in raw_lines(self._input)] if several or done else []
        if strange := done - set(numbers):
            raise ValueError(f"the output has line {min(strange)}, and the input has none of that number")
        if several:
            words = broadcast(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))
            seed = int(words[0]) << 32 | int(words[1])
            is_done = broadcast(np.array([number in done for number in numbers], np.uint8))
            done = {number for number, one in zip(numbers, is_done, strict=True) if one}
        return seed, done
