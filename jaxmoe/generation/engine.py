"""The generation loop. It knows token ids only; text stays outside."""

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
from flax import nnx

from jaxmoe.generation.model import Model
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.programs import Leaves, Record, Sampled, Shape, programs_of
from jaxmoe.generation.sampling import Controls, Mode, seed_words
from jaxmoe.generation.speculative import SpeculativeBatch, SpeculativeStep
from jaxmoe.generation.stats import GenerationStats
from jaxmoe.layers import check_usable
from jaxmoe.models.padding import bucket_length
from jaxmoe.models.replay import ReplayedSteps
from jaxmoe.models.routing import Routing
from jaxmoe.placement.balancer import Balancer

FinishReason = Literal["length", "stop"]

# Told of every token: (row, token id, finish reason or None). Returning True ends the row there.
OnToken = Callable[[int, int, FinishReason | None], bool]


@dataclasses.dataclass
class Row:
    """The generated part of one prompt; `finish_reason` is None while it runs."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None


class Engine:
    """Generates from token ids with one model.

    Making an engine takes the model's weights as they are at that moment and finds the
    programs that earlier engines compiled for it, so it is cheap to make one per call.

    Args:
        model: model from `jaxmoe.load`, or another `jaxmoe.generation.model.Model`.

    Example:
        >>> rows = Engine(model).run([[5, 6, 7]], SamplingParams(), max_new_tokens=8)
        >>> len(rows[0].token_ids), rows[0].finish_reason
        (8, 'length')
    """

    def __init__(self, model: Model):
        self._model = model
        self._module = cast(nnx.Module, model)  # which it is too, and a Protocol cannot say
        self.programs = programs_of(model)
        self._bind()
        self._recorder, self._replay = model.recorder, model.replay

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        max_new_tokens: int,
        eos_token_ids: Collection[int] = (),
        seeds: Sequence[int] | None = None,
        adapter_ids: np.ndarray | None = None,
        on_token: OnToken | None = None,
        stats: GenerationStats | None = None,
        balancer: Balancer | None = None,
        num_drafts: int = 0,
    ) -> list[Row]:
        """Generate one batch.

        The token of step t is read by the host while the devices already compute step t + 1,
        so finding the end of the text (and whatever `on_token` does) costs them no time. A row that
        has ended stays in the batch; its tokens are dropped and reach no expert any more.

        Args:
            prompts: token ids, at least one prompt of at least one token.
            params: settings by which tokens are chosen.
            max_new_tokens: number of tokens after which a row ends with reason "length".
            eos_token_ids: tokens at which a row ends with reason "stop"; they stay in it.
            seeds: seeds, one per prompt; needed unless greedy.
            adapter_ids: int32, number of each prompt's adapter, -1 for none; None for none at all.
            on_token: function that is told of every token, see `OnToken`; a row that it ends has reason "stop".
            stats: object to which counts and times are added.
            balancer: balancer that is told of every step's routing; where it proposes a placement, the model is
                rebalanced between two steps.
            num_drafts: number of tokens that each step guesses and checks, by the model's layers for multi-token
                prediction; 0 for none. With drafts `params` are greedy, and nothing is replayed or recorded by token.

        Returns:
            One row per prompt.

        Raises:
            ValueError: a trace that is being replayed is of another generation.
        """
        stats = GenerationStats() if stats is None else stats
        rows = [Row() for _ in prompts]
        compiled_before = self.programs.compile_seconds
        replay = None if self._replay is None else self._replay.steps()
        if replay is not None:
            replay.check_length(max_new_tokens)
        batch: _Batch | SpeculativeBatch
        if num_drafts:
            batch = SpeculativeBatch(
                self.programs, self._leaves, self._model, prompts, max_new_tokens, num_drafts, self._record(balancer)
            )
        else:
            batch = _Batch(self, prompts, params, max_new_tokens, seeds, self._record(balancer), replay, adapter_ids)
        stats.prompts += len(prompts)
        stats.prompt_tokens += sum(map(len, prompts))
        stats.compile_seconds += self.programs.compile_seconds - compiled_before

        ready = first = time.perf_counter()
        coming: _Step | SpeculativeStep = batch.prefill()
        for step in range(1, max_new_tokens + 1):
            arrived = coming
            if step < max_new_tokens:
                coming = batch.decode(cast(Any, arrived))
            tokens = arrived.tokens()
            if step == 1:
                first = time.perf_counter()
                stats.prefill_seconds += first - ready
            running = [index for index, row in enumerate(rows) if row.finish_reason is None]
            handed_out = [
                _extend(rows[index], index, tokens[index], max_new_tokens, eos_token_ids, on_token) for index in running
            ]
            stats.generated_tokens += sum(handed_out)
            if step > 1:
                stats.decode_steps += 1
                stats.decode_tokens += sum(handed_out)
                stats.drafted_tokens += num_drafts * len(running)
                # The last token of a row is the model's own.
                drafts = (len(tokens[index]) - 1 for index in running)
                stats.accepted_tokens += sum(map(min, handed_out, drafts))
            moved = arrived.routing is not None and self._watch(arrived.routing, balancer)
            # `on_token` may have rebalanced or trained the model as well: its old arrays are let go.
            if moved or self._has_changed():
                batch.leaves = self._bind()
            ended = [index for index in running if rows[index].finish_reason]
            if len(ended) == len(running):
                if self._recorder is not None and step < max_new_tokens and coming.routing is not None:
                    # The step that was under way already: it has counted the tokens that ended the rows.
                    self._recorder.add(coming.routing)
                break
            if ended:
                batch.retire(ended)
        stats.decode_seconds += time.perf_counter() - first
        if replay is not None:
            replay.check_end()
        return rows

    def _bind(self) -> Leaves:
        """Take the model's arrays as they are now."""
        check_usable(self._module)
        self._leaves: Leaves = self.programs.bind(self._model)
        self._variables = [
            (variable, variable.get_value()) for _, variable in nnx.to_flat_state(nnx.state(self._module))
        ]
        return self._leaves

    def _has_changed(self) -> bool:
        # A deleted array would take the process down.
        return any(variable.get_value() is not value or value.is_deleted() for variable, value in self._variables)

    def _record(self, balancer: Balancer | None) -> Record:
        """The part of their routing that the steps have to tell."""
        if self._recorder is not None and self._recorder.token_ids:
            return "token_ids"
        return "nothing" if self._recorder is None and balancer is None else "counts"

    def _watch(self, routing: Routing, balancer: Balancer | None) -> bool:
        """Pass a step's routing on, and tell whether the model's experts were moved."""
        if self._recorder is not None:
            self._recorder.add(routing)
        if balancer is None:
            return False
        balancer.observe(np.asarray(routing.counts))
        placements = balancer.propose(self._model.placements)
        if placements is None:
            return False
        self._model.rebalance(placements, num_nodes=balancer.num_nodes, optimizer=balancer.optimizer)
        return True


def _extend(
    row: Row,
    index: int,
    tokens: Sequence[int],
    max_new_tokens: int,
    eos_token_ids: Collection[int],
    on_token: OnToken | None,
) -> int:
    """Hand out a step's tokens of a row until it ends, and tell how many they were."""
    for count, token in enumerate(tokens, 1):
        row.token_ids.append(token)
        if token in eos_token_ids:
            row.finish_reason = "stop"
        elif len(row.token_ids) == max_new_tokens:
            row.finish_reason = "length"
        if on_token is not None and on_token(index, token, row.finish_reason):
            row.finish_reason = "stop"
        if row.finish_reason is not None:
            return count
    return len(tokens)


class _Step(NamedTuple):
    """One step under way on the devices."""

    sampled: Sampled
    routing: Routing | None

    def tokens(self) -> list[list[int]]:
        """The token of each row."""
        return [[token] for token in np.asarray(self.sampled.token).tolist()]


class _Batch:
    """The device side of one `Engine.run`: padded inputs, the cache and the programs for their shape."""

    def __init__(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        max_new_tokens: int,
        seeds: Sequence[int] | None,
        record: Record,
        replay: ReplayedSteps | None,
        adapter_ids: np.ndarray | None,
    ):
        model, programs, leaves = engine._model, engine.programs, engine._leaves
        config = model.config
        longest = max(map(len, prompts))
        shape = Shape(
            rows=model.padded_batch(len(prompts)),
            prompt=bucket_length(longest, config.max_position_embeddings),
            cache=bucket_length(longest + max_new_tokens, config.max_position_embeddings),
        )
        mode = Mode.of(params)
        init_cache = programs.init_cache(leaves, shape)
        self.leaves = leaves
        choices = None if replay is None else replay.choices_shape
        self._replay = replay
        adapted = adapter_ids is not None
        self._prefill = programs.prefill(leaves, shape, record, choices, adapted)
        self._decode = programs.decode(leaves, shape, record, choices, adapted) if max_new_tokens > 1 else None
        self._sample = programs.sampler(shape, config.vocab_size, mode)

        tokens = np.zeros((shape.rows, shape.prompt), np.int32)
        lengths = np.zeros(shape.rows, np.int32)
        for index, prompt in enumerate(prompts):
            tokens[index, : len(prompt)] = prompt
            lengths[index] = len(prompt)
        self._is_prompt = np.arange(shape.prompt) < lengths[:, None]
        self._tokens, self._lengths = programs.put(tokens), programs.put(lengths)
        self._controls = jax.tree.map(programs.put, Controls.of(params))
        padding = [0] * (shape.rows - len(prompts))
        self._adapter_ids = None
        if adapter_ids is not None:
            self._adapter_ids = programs.put(np.pad(adapter_ids, (0, len(padding)), constant_values=-1))
        self._seeds = programs.put(seed_words([*(seeds or [0] * len(prompts)), *padding]))
        # The sampler advances by one, so it starts one before the first generated token.
        self._position, self._step = programs.put(lengths - 1), programs.put(np.int32(0))
        seen = _seen(tokens, lengths, config.vocab_size) if mode.penalizes else None
        self._seen = None if seen is None else programs.put(seen, rows=True)
        self._active = np.arange(shape.rows) < len(prompts)
        self._active_on_device = programs.put(self._active.copy())
        self._put = programs.put
        self._cache = init_cache(leaves)

    def retire(self, rows: Sequence[int]) -> None:
        """Spare the experts these rows from the next step on."""
        self._active[list(rows)] = False
        self._active_on_device = self._put(self._active.copy())  # a CPU device may keep using the array it is given

    def prefill(self) -> _Step:
        expert_ids = self._replayed(self._is_prompt)
        logits, self._cache, routing = self._prefill(
            self.leaves, self._tokens, self._lengths, expert_ids, self._adapter_ids, self._cache
        )
        return _Step(self._choose(logits, self._position, self._step, self._seen), routing)

    def decode(self, last: _Step) -> _Step:
        assert self._decode is not None
        token, position, step, seen = last.sampled
        expert_ids = self._replayed(self._active)
        logits, self._cache, routing = self._decode(
            self.leaves, token, position, self._active_on_device, expert_ids, self._adapter_ids, self._cache
        )
        return _Step(self._choose(logits, position, step, seen), routing)

    def _replayed(self, mask: np.ndarray) -> jax.Array | None:
        """The next step's choices on the devices, for the tokens where `mask` is True."""
        return None if self._replay is None else self._put(self._replay.take(mask))

    def _choose(self, logits: jax.Array, position: jax.Array, step: jax.Array, seen: jax.Array | None) -> Sampled:
        chosen = self._sample(logits, self._seeds, position, step, seen, self._controls)
        chosen.token.copy_to_host_async()
        return chosen


def _seen(tokens_BS: np.ndarray, lengths_B: np.ndarray, vocab_size: int) -> np.ndarray:
    """Bool [B, V]: the tokens of each prompt."""
    seen = np.zeros((len(tokens_BS), vocab_size), bool)
    for row, tokens, length in zip(seen, tokens_BS, lengths_B, strict=True):
        row[tokens[:length]] = True
    return seen
