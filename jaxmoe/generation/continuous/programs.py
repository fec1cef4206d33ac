"""The compiled functions of continuous batching: empty cache, prefill, decode step, sampler.

There are as many of them as the sizes say, whatever the prompts: `SlotPrograms.compile_all` compiles each.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.generation import sampling
from jaxmoe.generation.continuous.layout import CacheLayout, Store
from jaxmoe.generation.continuous.sizes import Sizes
from jaxmoe.generation.model import Model
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.programs import Leaves, Programs, Record
from jaxmoe.generation.requests import MOST_LOGPROBS
from jaxmoe.mesh import named
from jaxmoe.models import Decoder
from jaxmoe.models.belongings import Belongings

# Columns of the small arrays that say what each row does.
POSITION, COUNT, SLOT, ADAPTER = range(4)


class Choice(NamedTuple):
    """The parts of a sampler that act in some row. They are static, and few: a sampler for all is slower for those without.

    Attributes:
        samples: whether some row leaves something to chance.
        truncates: whether some row that does so has top-k or top-p.
        edits: whether some row has a bias, banned tokens or a repetition penalty.
        logprobs: whether some row wants to know log-probabilities.
    """

    samples: bool = False
    truncates: bool = False
    edits: bool = False
    logprobs: bool = False

    @classmethod
    def all(cls) -> "list[Choice]":
        """Every one there is."""
        both = (False, True)
        draws = ((False, False), (True, False), (True, True))
        return [cls(*draw, edits, logprobs) for draw in draws for edits in both for logprobs in both]


class Edits(NamedTuple):
    """Arrays that change the logits of each slot, on the devices.

    Attributes:
        bias: float32 [B, V], added to the logits; -inf for a token that must not come.
        seen: bool [B, V], tokens of the prompt and generated; kept up where there is a repetition penalty.
    """

    bias: jax.Array
    seen: jax.Array


class Logprobs(NamedTuple):
    """Log-probabilities of a step's tokens: of the chosen ones [B], of the likeliest [B, k], and which those are."""

    chosen: jax.Array
    top: jax.Array
    top_ids: jax.Array


class Chosen(NamedTuple):
    """The tokens that a sampler leaves: int32 [B] on every device, those of rows without one as they were."""

    token: jax.Array
    seen: jax.Array | None
    logprobs: Logprobs | None


class SlotPrograms(Programs):
    """Compiles what an engine of some sizes runs, and remembers; holds no weights and no reference to the model.

    Args:
        model: model, with weights or without.
        sizes: sizes of the programs and the cache.
        layout: layout of the cache.
    """

    def __init__(self, model: Decoder, sizes: Sizes, layout: CacheLayout):
        super().__init__(model.mesh)
        self.sizes, self.layout, self.vocab_size = sizes, layout, model.config.vocab_size

    @property
    def slots(self) -> int:
        """Slots of all groups together."""
        return self.sizes.groups * self.sizes.slots

    def compile_all(self, leaves: Leaves, *, record: Record = "nothing", adapted: bool = False) -> Iterator[str]:
        """Compile every program, and tell the name of each as it is done.

        Args:
            leaves: arrays of the model from `bind`; abstract ones will do.
            record: part of its routing that each step tells.
            adapted: whether rows have adapters.
        """
        self.empty(leaves)
        yield "an empty cache"
        for rows, size, history in self.sizes.prefills:
            self.prefill_chunk(leaves, rows, size, history, record, adapted)
            yield f"prefill of {rows} x {size} tokens" + (f" behind {history}" if history else "")
        for length in self.sizes.lengths:
            self.decode_step(leaves, length, record, adapted)
            yield f"decode step of {self.slots} rows in {length} positions"
        self.set_row(jnp.float32)
        self.set_row(jnp.bool_)
        for choice in Choice.all():
            self.slot_sampler(choice)
        yield "samplers"

    def empty(self, leaves: Leaves) -> Callable[[Leaves], Store]:
        """Compile ``(leaves) -> store``."""

        def empty(leaves: Leaves) -> Store:
            del leaves
            return self.layout.empty(self.sizes)

        return self._compile(("empty",), empty, (leaves,))

    def prefill_chunk(
        self, leaves: Leaves, rows: int, size: int, history: int, record: Record, adapted: bool
    ) -> Callable[..., tuple]:
        """Compile ``(leaves, tokens_BS, rows_B4, pages_Bn, table_Bm, store) -> (logits, store, routing)``.

        A row's `COUNT` tokens stand from its `POSITION` on. `pages_Bn` are the pages that they go to, `table_Bm` all pages
        of the row, which is None without a history. The logits are those of each row's last token at its slot.
        """
        layout, B = self.layout, self.sizes.groups * rows

        def prefill(
            leaves: Leaves,
            tokens: jax.Array,
            rows: jax.Array,
            pages: jax.Array,
            table: jax.Array | None,
            store: Store,
        ) -> tuple:
            model = self._decoder(leaves)
            first, count, slot = rows[:, POSITION], rows[:, COUNT], rows[:, SLOT]
            adapters = rows[:, ADAPTER] if adapted else None
            if table is None:
                cache = model.empty_cache(model.layers[: model.config.num_main_layers], B, size)
                logits, cache, stats = model.prefill_and_stats(tokens, count, cache, adapter_ids_B=adapters)
            else:
                cache = layout.view(store, table, jnp.minimum(slot, self.sizes.slots - 1))
                logits, cache, stats = model.extend_and_stats(tokens, first, count, cache, adapter_ids_B=adapters)
            store = layout.keep_chunk(store, cache, pages, first // self.sizes.page, slot)
            return layout.by_slot(logits, slot, self.sizes), store, self._routing(cast(Model, model), stats, record)

        n, page = size // self.sizes.page, self.sizes.page
        args = (
            self._spec(jnp.int32, B, size),
            self._spec(jnp.int32, B, 4),
            self._spec(jnp.int32, B, n),
            self._spec(jnp.int32, B, history // page + n) if history else None,
        )
        return self._model_program(("prefill", rows, size, history, record, adapted), prefill, leaves, args)

    def decode_step(self, leaves: Leaves, length: int, record: Record, adapted: bool) -> Callable[..., tuple]:
        """Compile ``(leaves, token_B, rows_B4, table_Bn, store) -> (logits_BV, store, routing)``.

        Rows with a `COUNT` of 0 have no token.
        """
        layout = self.layout

        def decode(leaves: Leaves, token: jax.Array, rows: jax.Array, table: jax.Array, store: Store) -> tuple:
            model = self._decoder(leaves)
            position, active = rows[:, POSITION], rows[:, COUNT] > 0
            adapters = rows[:, ADAPTER] if adapted else None
            cache = layout.view(store, table)
            logits, cache, stats = model.decode_and_stats(token, position, cache, active, adapter_ids_B=adapters)
            store = layout.keep_token(store, cache, table, position, active)
            return logits, store, self._routing(cast(Model, model), stats, record)

        B = self.slots
        args = (
            self._spec(jnp.int32, B),
            self._spec(jnp.int32, B, 4),
            self._spec(jnp.int32, B, length // self.sizes.page),
        )
        return self._model_program(("decode", length, record, adapted), decode, leaves, args)

    def slot_sampler(self, choice: Choice) -> Callable[..., Chosen]:
        """Compile ``(logits_BV, token_B, steps_B2, seeds_B2, controls, bias_BV, seen_BV) -> Chosen``.

        `steps_B2` has the number of tokens generated before, and whether a row gets a token. `bias_BV` and `seen_BV` are
        those of an `Edits`, or None where no row has edits; `seen_BV` is donated.
        """
        B, V = self.slots, self.vocab_size

        def sample(
            logits: jax.Array,
            token: jax.Array,
            steps: jax.Array,
            seeds: jax.Array,
            controls: sampling.Controls,
            bias: jax.Array | None,
            seen: jax.Array | None,
        ) -> Chosen:
            mode = sampling.Mode(not choice.samples, choice.truncates, choice.edits)
            gets = steps[:, 1] > 0
            new = sampling.choose(logits, seeds, steps[:, 0], seen, controls, mode, bias)
            token = jnp.where(gets, new, token)
            if seen is not None:
                seen |= (jnp.arange(V, dtype=jnp.int32)[None] == token[:, None]) & gets[:, None]
            logprobs = _logprobs(logits, token) if choice.logprobs else None
            return Chosen(token, seen, logprobs)

        everywhere, rows = named(self.mesh), self._rows(B)

        def table(dtype: Any) -> Any:
            return jax.ShapeDtypeStruct((B, V), dtype, sharding=rows)

        controls = sampling.Controls.of(SamplingParams())
        args = (
            table(jnp.float32),
            self._spec(jnp.int32, B),
            self._spec(jnp.int32, B, 2),
            self._spec(jnp.uint32, B, 2),
            jax.tree.map(lambda value: self._spec(value.dtype, B), controls),
            *((table(jnp.float32), table(jnp.bool_)) if choice.edits else (None, None)),
        )
        out: Any = Chosen(
            everywhere,  # type: ignore[arg-type]
            rows if choice.edits else None,  # type: ignore[arg-type]
            Logprobs(everywhere, everywhere, everywhere) if choice.logprobs else None,  # type: ignore[arg-type]
        )
        return self._compile(("sample", choice), sample, args, out, donate=(6,) if choice.edits else ())

    def set_row(self, dtype: Any) -> Callable[[jax.Array, np.ndarray, np.ndarray], jax.Array]:
        """Compile ``(table_BV, slot, row_V) -> table_BV`` with that row changed; the table is donated."""
        B, V, rows = self.slots, self.vocab_size, self._rows(self.slots)

        def set_row(table: jax.Array, slot: jax.Array, row: jax.Array) -> jax.Array:
            return jnp.where((jnp.arange(B, dtype=jnp.int32) == slot)[:, None], row[None], table)

        args = (
            jax.ShapeDtypeStruct((B, V), dtype, sharding=rows),
            self._spec(jnp.int32),
            self._spec(dtype, V),
        )
        return self._compile(("set_row", jnp.dtype(dtype).name), set_row, args, rows, donate=(0,))

    def _holds(self) -> dict[str, Any]:
        return {**super()._holds(), "sizes": self.sizes, "layout": self.layout, "vocab_size": self.vocab_size}

    def _model_program(self, key: tuple, function: Callable, leaves: Leaves, args: tuple) -> Callable[..., tuple]:
        """Compile a program that takes the model's arrays first and the store last, which it hands on."""
        self.empty(leaves)
        store = self._out["empty",]
        out = (self._rows(self.slots), jax.tree.map(lambda spec: spec.sharding, store), None)
        return self._compile(key, function, (leaves, *args, store), out, donate=(len(args) + 1,))


def _logprobs(logits_BV: jax.Array, token_B: jax.Array) -> Logprobs:
    logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
    chosen_B = jnp.take_along_axis(logprobs_BV, token_B[:, None], axis=1)[:, 0]
    return Logprobs(chosen_B, *jax.lax.top_k(logprobs_BV, min(MOST_LOGPROBS, logprobs_BV.shape[1])))


_PROGRAMS: Belongings[dict[Sizes, SlotPrograms]] = Belongings()


def slot_programs_of(model: Decoder, sizes: Sizes, layout: CacheLayout) -> SlotPrograms:
    """The programs of these sizes that were compiled for this model so far, in this process."""
    by_sizes = _PROGRAMS.of(model)
    if by_sizes is None:
        by_sizes = {}
        _PROGRAMS.give(model, by_sizes)
    if sizes not in by_sizes:
        by_sizes[sizes] = SlotPrograms(model, sizes, layout)
    return by_sizes[sizes]
