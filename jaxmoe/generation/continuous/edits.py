"""The sampling settings of each slot, on the host and on the devices."""

import jax
import numpy as np

from jaxmoe.generation.continuous.job import Job
from jaxmoe.generation.continuous.programs import Choice, Edits, SlotPrograms
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.requests import Request
from jaxmoe.generation.sampling import Controls, seed_words


class RowSettings:
    """The settings of the jobs in their slots; what the devices have of them is renewed when it has changed.

    Args:
        programs: programs of the engine.

    Attributes:
        seen: tokens of each slot, for repetition penalties; None as long as no job needed it.
    """

    def __init__(self, programs: SlotPrograms):
        self._programs, slots = programs, programs.slots
        plain = Controls.of(SamplingParams())
        self._controls = [np.full(slots, value) for value in plain]
        self._seeds = np.zeros((slots, 2), np.uint32)
        self._on_devices: tuple[jax.Array, Controls] | None = None
        self._bias: jax.Array | None = None
        self.seen: jax.Array | None = None
        # Slots whose bias is not 0, and jobs whose tokens are not in `seen` yet.
        self._biased: set[int] = set()
        self._new: set[int] = set()

    def admit(self, job: Job) -> None:
        """Take the settings of a job that has got a slot."""
        row, request = self._programs.sizes.row_of(job.place), job.request
        for array, value in zip(self._controls, Controls.of(request.params), strict=True):
            array[row] = value
        self._seeds[row] = seed_words([request.seed or 0])[0]
        self._on_devices = None
        self._new.add(job.id)

    def leave(self, job: Job) -> None:
        """Forget a job that is about to give back its slot, if it has one."""
        self._new.discard(job.id)

    @property
    def seeds(self) -> jax.Array:
        """Threefry keys of the slots, uint32 [B, 2]."""
        return self._put()[0]

    @property
    def controls(self) -> Controls:
        """Settings of the slots."""
        return self._put()[1]

    def choice(self, jobs: list[Job]) -> Choice:
        """The least that a sampler has to do for these jobs."""
        drawn = [job.request.params for job in jobs if not job.request.params.greedy]
        return Choice(
            samples=bool(drawn),
            truncates=any(params.truncates for params in drawn),
            edits=any(_edits(job.request) for job in jobs),
            logprobs=any(job.request.logprobs is not None for job in jobs),
        )

    def edits(self, jobs: list[Job]) -> Edits:
        """Put on the devices all that changes the logits of these jobs in the step to come.

        Raises:
            ValueError: a constraint allows no token, or answers for another vocabulary.
        """
        B, V = self._programs.slots, self._programs.vocab_size
        if self._bias is None or self.seen is None:
            self._bias = self._programs.put(np.zeros((B, V), np.float32), rows=True)
            self.seen = self._programs.put(np.zeros((B, V), bool), rows=True)
        for job in jobs:
            row, request, step = self._programs.sizes.row_of(job.place), job.request, job.launched - 1
            new = job.id in self._new
            self._new.discard(job.id)
            changes = request.constraint is not None or (request.min_new_tokens > 0 and step == request.min_new_tokens)
            if changes or (new and (_biases(request) or row in self._biased)):
                bias_V = _bias(request, step, V)
                self._bias = self._set_row(self._bias, row, bias_V)
                (self._biased.add if bias_V.any() else self._biased.discard)(row)
            if new and request.params.penalizes:
                seen_V = np.zeros(V, bool)
                seen_V[job.token_ids] = True
                self.seen = self._set_row(self.seen, row, seen_V)
        return Edits(self._bias, self.seen)

    def _set_row(self, table: jax.Array, row: int, value: np.ndarray) -> jax.Array:
        put = self._programs.put
        return self._programs.set_row(value.dtype)(table, put(np.int32(row)), put(value))  # type: ignore[arg-type]

    def _put(self) -> tuple[jax.Array, Controls]:
        if self._on_devices is None:
            put = self._programs.put
            # A CPU device may keep using the array it is given.
            self._on_devices = put(self._seeds.copy()), Controls(*(put(array.copy()) for array in self._controls))
        return self._on_devices


def _biases(request: Request) -> bool:
    return bool(request.logit_bias) or request.min_new_tokens > 0 or request.constraint is not None


def _edits(request: Request) -> bool:
    return _biases(request) or request.params.penalizes


def _bias(request: Request, step: int, vocab_size: int) -> np.ndarray:
    """Numbers to add to the logits of a request's next token, float32 [V]; -inf for one that must not come."""
    bias_V = np.zeros(vocab_size, np.float32)
    for token, value in request.logit_bias.items():
        bias_V[token] = value
    if request.constraint is not None:
        allowed_V = np.asarray(request.constraint.allowed())
        if allowed_V.shape != (vocab_size,) or allowed_V.dtype != bool or not allowed_V.any():
            raise ValueError(
                f"a constraint allows at least one of the {vocab_size} tokens, as bool [{vocab_size}]; got "
                f"{allowed_V.dtype.name} {list(allowed_V.shape)} with {int(np.count_nonzero(allowed_V))} allowed"
            )
        bias_V[~allowed_V] = -np.inf
    if step < request.min_new_tokens:
        without_end = bias_V.copy()
        without_end[list(request.eos_token_ids)] = -np.inf
        # A constraint that allows nothing but the end is heard.
        if np.isfinite(without_end).any():
            return without_end
    return bias_V
