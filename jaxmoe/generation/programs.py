"""The compiled functions of one model: cache, prefill, decode step, sampler.

They are compiled ahead of their first call. That keeps compile time out of every
measured time, and makes "which programs exist" a dictionary to look at. The sampler is a
program of its own: a change from greedy to sampled text compiles a few reductions, not the
whole model again. The price is one more launch a step, about 5 us on one device.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.distributed import barrier
from jaxmoe.generation import sampling
from jaxmoe.generation.kept_programs import compile_program
from jaxmoe.generation.model import Model
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.program_key import Digests
from jaxmoe.mesh import batch_axes, named, put
from jaxmoe.models import Decoder, speculation
from jaxmoe.models.belongings import Belongings
from jaxmoe.models.routing import Routing, routing_of

# A model's arrays, in the order of its tree.
Leaves = list[jax.Array]
# What a step tells of its routing: nothing, counts, or the choices of every token too.
Record = Literal["nothing", "counts", "token_ids"]
Step = Callable[..., tuple[jax.Array, Any, Routing | None]]
# MoE layers L and choices K of a token that a step is given instead of choosing them.
Choices = tuple[int, int]


class Shape(NamedTuple):
    """Padded sizes of a batch; one set of programs serves every batch of the same shape."""

    rows: int
    prompt: int
    cache: int


class Sampled(NamedTuple):
    """Arrays that one step leaves on the devices for the next one.

    Attributes:
        token: chosen tokens, int32 [B], on every device.
        position: positions at which they stand, int32 [B].
        step: number of tokens generated before them, an int32 scalar.
        seen: tokens up to and including them, bool [B, V]; None without a repetition penalty.
    """

    token: jax.Array
    position: jax.Array
    step: jax.Array
    seen: jax.Array | None


class Programs:
    """Compiles on demand and remembers; holds no weights and no reference to the model.

    Attributes:
        mesh: mesh of the model.
        compiled: programs by name and sizes.
        compile_seconds: time spent tracing and compiling since the start.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.compiled: dict[tuple, jax.stages.Compiled] = {}
        self.compile_seconds = 0.0
        self._graphdef: Any = None
        self._treedef: Any = None
        self._signature: Any = None
        self._out: dict[tuple, Any] = {}  # by program, what it gives
        self._digests = Digests()

    def bind(self, model: Model) -> Leaves:
        """Take the model's arrays as they are now, in the order in which the programs take them.

        Weights may have been swapped since the last call (other values: nothing is compiled
        again) or reshaped and resharded (everything is).
        """
        # Without recorder and replay, which are arguments of a program: those of a model with them serve it without, too.
        graphdef, state = model.split_network()
        leaves, treedef = jax.tree.flatten(state)
        signature = tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)
        if (graphdef, treedef, signature) != (self._graphdef, self._treedef, self._signature):
            self._graphdef, self._treedef, self._signature = graphdef, treedef, signature
            self.compiled.clear()
            self._out.clear()
            self._digests = Digests()
        return leaves

    def init_cache(self, leaves: Leaves, shape: Shape) -> Callable[[Leaves], Any]:
        """Compile ``(leaves) -> cache``.

        Prefill and decode hand the cache on exactly as it is laid out here, so that it can be donated and the next
        step finds what it was compiled for.
        """

        def init(leaves: Leaves) -> Any:
            return self._model(leaves).init_cache(shape.rows, shape.cache)

        return self._compile(("init_cache", shape.rows, shape.cache), init, (leaves,))

    def prefill(
        self, leaves: Leaves, shape: Shape, record: Record, replay: Choices | None = None, adapted: bool = False
    ) -> Step:
        """Compile ``(leaves, tokens_BS, lengths_B, expert_ids_BSLK, adapter_ids_B, cache) -> (logits_BV, cache, routing)``.

        The cache is donated; `expert_ids_BSLK` are choices of `replay`'s shape, or None without one, and `adapter_ids_B` are
        None unless some row is `adapted`.
        """

        def prefill(
            leaves: Leaves,
            tokens: jax.Array,
            lengths: jax.Array,
            expert_ids: jax.Array | None,
            adapter_ids: jax.Array | None,
            cache: Any,
        ) -> tuple:
            model: Any = self._model(leaves)
            chosen = {} if adapter_ids is None else {"adapter_ids_B": adapter_ids}
            logits, cache, stats = model.prefill_and_stats(tokens, lengths, cache, expert_ids, **chosen)
            return logits, cache, self._routing(model, stats, record)

        expert_ids = None if replay is None else self._spec(jnp.int32, shape.rows, shape.prompt, *replay)
        rows = self._spec(jnp.int32, shape.rows)
        args = (self._spec(jnp.int32, shape.rows, shape.prompt), rows, expert_ids, rows if adapted else None)
        return self._model_step(("prefill", *shape, record, replay, adapted), prefill, leaves, shape, args)

    def decode(
        self, leaves: Leaves, shape: Shape, record: Record, replay: Choices | None = None, adapted: bool = False
    ) -> Step:
        """Compile ``(leaves, token_B, position_B, active_B, expert_ids_BLK, adapter_ids_B, cache)``.

        It gives the same as `prefill`. The cache is donated; `expert_ids_BLK` are choices of `replay`'s shape, or None
        without one.
        """

        def decode(
            leaves: Leaves,
            token: jax.Array,
            position: jax.Array,
            active: jax.Array,
            expert_ids: jax.Array | None,
            adapter_ids: jax.Array | None,
            cache: Any,
        ) -> tuple:
            model: Any = self._model(leaves)
            chosen = {} if adapter_ids is None else {"adapter_ids_B": adapter_ids}
            logits, cache, stats = model.decode_and_stats(token, position, cache, active, expert_ids, **chosen)
            return logits, cache, self._routing(model, stats, record)

        args = (
            self._spec(jnp.int32, shape.rows),
            self._spec(jnp.int32, shape.rows),
            self._spec(jnp.bool_, shape.rows),
            None if replay is None else self._spec(jnp.int32, shape.rows, *replay),
            self._spec(jnp.int32, shape.rows) if adapted else None,
        )
        key = ("decode", shape.rows, shape.cache, record, replay, adapted)
        return self._model_step(key, decode, leaves, shape, args)

    def _routing(self, model: Model, stats: Any, record: Record) -> Routing | None:
        if record == "nothing":
            return None
        # Layers for multi-token prediction may not be among those that were run.
        num_layers = len(model.moe_layers) if isinstance(model, Decoder) else len(stats)
        return routing_of(stats, self.mesh, token_ids=record == "token_ids", num_layers=num_layers)

    def init_speculation(self, leaves: Leaves, shape: Shape, num_drafts: int) -> Callable[[Leaves], Any]:
        """Compile ``(leaves) -> SpeculationCache``."""

        def init(leaves: Leaves) -> Any:
            return speculation.init_cache(self._decoder(leaves), shape.rows, shape.cache, num_drafts)

        return self._compile(("init_speculation", shape.rows, shape.cache, num_drafts), init, (leaves,))

    def begin(self, leaves: Leaves, shape: Shape, num_drafts: int, record: Record) -> Callable[..., tuple]:
        """Compile ``(leaves, tokens_BS, lengths_B, cache) -> (Checked, Progress, cache, routing)``; the cache is donated."""

        def begin(leaves: Leaves, tokens: jax.Array, lengths: jax.Array, cache: Any) -> tuple:
            model = self._decoder(leaves)
            *result, stats = speculation.begin(model, tokens, lengths, cache, num_drafts)
            return (*result, self._routing(model, stats, record))

        args = (self._spec(jnp.int32, shape.rows, shape.prompt), self._spec(jnp.int32, shape.rows))
        return self._speculate(("begin", *shape, num_drafts, record), begin, leaves, shape, num_drafts, args)

    def advance(
        self, leaves: Leaves, shape: Shape, num_drafts: int, record: Record, width: int, dtype: Any
    ) -> Callable[..., tuple]:
        """Compile ``(leaves, active_B, Progress, cache) -> (Checked, Progress, cache, routing)``; the cache is donated.

        `width` and `dtype` are those of the model's hidden states.
        """

        def advance(leaves: Leaves, active: jax.Array, progress: speculation.Progress, cache: Any) -> tuple:
            model = self._decoder(leaves)
            *result, stats = speculation.advance(model, progress, active, cache)
            return (*result, self._routing(model, stats, record))

        B, k = shape.rows, num_drafts
        hidden = jax.ShapeDtypeStruct((B, k - 1, width), dtype, sharding=self._rows(B))
        tokens: Any = self._spec(jnp.int32, B, k)
        progress = speculation.Progress(self._spec(jnp.int32, B), tokens, tokens, hidden)  # type: ignore[arg-type]
        args = (self._spec(jnp.bool_, B), progress)
        key = ("advance", shape.rows, shape.cache, num_drafts, record)
        return self._speculate(key, advance, leaves, shape, num_drafts, args)

    def _speculate(
        self, key: tuple, step: Callable, leaves: Leaves, shape: Shape, num_drafts: int, args: tuple
    ) -> Callable[..., tuple]:
        everywhere, cache = named(self.mesh), self._out["init_speculation", shape.rows, shape.cache, num_drafts]
        state: tuple[Any, ...] = (everywhere, everywhere, everywhere, self._rows(shape.rows))
        progress, checked = speculation.Progress(*state), speculation.Checked(*state[:2])
        out = (checked, progress, jax.tree.map(lambda spec: spec.sharding, cache), None)
        return self._compile(key, step, (leaves, *args, cache), out, donate=(len(args) + 1,))

    def _decoder(self, leaves: Leaves) -> Decoder:
        return cast(Decoder, self._model(leaves))

    def sampler(self, shape: Shape, vocab_size: int, mode: sampling.Mode) -> Callable[..., Sampled]:
        """Compile ``(logits_BV, seeds_B2, position_B, step, seen_BV | None, controls) -> Sampled``; `seen` is donated."""

        def sample(
            logits: jax.Array,
            seeds: jax.Array,
            position: jax.Array,
            step: jax.Array,
            seen: jax.Array | None,
            controls: sampling.Controls,
        ) -> Sampled:
            token = sampling.choose(logits, seeds, step, seen, controls, mode)
            if seen is not None:
                seen = seen.at[jnp.arange(shape.rows, dtype=jnp.int32), token].set(True)
            return Sampled(token, position + 1, step + 1, seen)

        everywhere, rows = named(self.mesh), self._rows(shape.rows)
        args = (
            jax.ShapeDtypeStruct((shape.rows, vocab_size), jnp.float32, sharding=rows),
            self._spec(jnp.uint32, shape.rows, 2),
            self._spec(jnp.int32, shape.rows),
            self._spec(jnp.int32),
            jax.ShapeDtypeStruct((shape.rows, vocab_size), jnp.bool_, sharding=rows) if mode.penalizes else None,
            jax.tree.map(lambda value: self._spec(value.dtype), sampling.Controls.of(SamplingParams())),
        )
        # The token comes back on every device: the host reads it from its own, and decode takes it as it is.
        out = Sampled(everywhere, everywhere, everywhere, rows if mode.penalizes else None)  # type: ignore[arg-type]
        return self._compile(("sample", shape.rows, mode), sample, args, out, donate=(4,) if mode.penalizes else ())

    def put(self, value: np.ndarray | np.generic, *, rows: bool = False) -> jax.Array:
        """Place a host array on the mesh: on every device, or dim 0 split like the batch."""
        return put(value, self._rows(value.shape[0]) if rows else named(self.mesh))

    def _spec(self, dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
        """A small argument, the whole of it on every device."""
        return jax.ShapeDtypeStruct(dims, dtype, sharding=named(self.mesh))

    def _rows(self, rows: int) -> jax.sharding.NamedSharding:
        return named(self.mesh, batch_axes(self.mesh, rows) or None)

    def _model(self, leaves: Leaves) -> Model:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _model_step(self, key: tuple, step: Callable, leaves: Leaves, shape: Shape, args: tuple) -> Callable:
        cache = self._out["init_cache", shape.rows, shape.cache]
        out = (self._rows(shape.rows), jax.tree.map(lambda spec: spec.sharding, cache), None)
        return self._compile(key, step, (leaves, *args, cache), out, donate=(len(args) + 1,))

    def _holds(self) -> dict[str, Any]:
        """Everything of this object that its programs depend on."""
        return {"mesh": self.mesh, "graphdef": self._graphdef, "treedef": self._treedef}

    def _compile(
        self, key: tuple, function: Callable, args: tuple, out: Any = None, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        """Compile a function, or find it compiled."""
        if key not in self.compiled:
            start = time.perf_counter()
            program = compile_program(
                self.mesh,
                function,
                args,
                holds=self._holds(),
                digests=self._digests,
                donate_argnums=donate,
                out_shardings=out,
            )
            self.compiled[key], self._out[key] = program
            self.compile_seconds += time.perf_counter() - start
            if self.mesh.is_multi_process:
                barrier()
        return self.compiled[key]


# Programs outlive a call of `generate` and end with their model.
_PROGRAMS: Belongings[Programs] = Belongings()


def programs_of(model: Model) -> Programs:
    """The programs compiled for this model so far, in this process."""
    module = cast(nnx.Module, model)
    programs = _PROGRAMS.of(module)
    if programs is None:
        programs = Programs(model.mesh)
        _PROGRAMS.give(module, programs)
    return programs
