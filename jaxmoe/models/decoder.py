"""The decoder every family shares, composed from `jaxmoe.layers` as its config says."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.checks import instance_of
from jaxmoe.config import DecoderConfig, LayerConfig, MoEConfig
from jaxmoe.dispatch import PhaseDispatch
from jaxmoe.layers import (
    NORMS,
    STREAMS,
    CacheArray,
    MoE,
    MoEStats,
    MovedBytes,
    ParamFactory,
    ReplicaRule,
    VocabTable,
    check_expert_axes,
    check_usable,
    rebalance_layers,
)
from jaxmoe.mesh import EP, TP, axes_size, batch_axes, check_mesh, named, padded_batch
from jaxmoe.models.adapters import AdapterPlaces
from jaxmoe.models.belongings import Belongings
from jaxmoe.models.checks import check_length, check_token_ids, check_tp
from jaxmoe.models.decoder_layer import DecoderLayer, Passed
from jaxmoe.models.describe import describe
from jaxmoe.models.kernels import describe_kernels
from jaxmoe.models.mtp import PredictionLayer
from jaxmoe.models.origin import Origin
from jaxmoe.models.padding import bucket_length, prompt_positions
from jaxmoe.models.parts import describe_packed
from jaxmoe.models.replay import ReplayedRouting, RoutingReplay, of_layers
from jaxmoe.models.routing import Routing, RoutingRecorder, routing_of
from jaxmoe.placement import ExpertPlacement, RoutingTrace, make_placements
from jaxmoe.placement.traffic import device_loads

# What every layer keeps of the tokens seen, first to last; None for a layer that keeps nothing.
Cache = tuple[Any, ...]

_LOAD_REPORTS: Belongings[Any] = Belongings()


class Decoder(nnx.Module):
    """A decoder-only transformer on a (dp, tp, ep) mesh.

    Args:
        config: sizes and kinds of its parts.
        mesh: mesh from `jaxmoe.make_mesh`.
        placement: one strategy name or `ExpertPlacement` for all MoE layers, or one for each.
        expert_axes, kernels: arguments of `jaxmoe.MoE`.
        dispatch: name or "auto" for all, or for each phase, {"prefill": ..., "decode": ...}.
        dtype: dtype of weights and activations.
        rngs: random streams for the weights; None leaves them abstract, for a loader to fill.
        origin: the checkpoint it comes from; None for random weights.
        one_of_alike: whether layers of the same config and placement are one object, in a model without values that is
            looked at and not run.

    Raises:
        ValueError: heads or widths do not divide over tp, or a placement does not fit.
    """

    # While a trace is replayed, an attribute of the module: its arrays are then in the module's state, and reach programs
    # that are compiled around a call of the model.
    replay: RoutingReplay | None = None
    # An attribute of the module once adapters are held beside the weights.
    adapter_places: AdapterPlaces | None = None

    def __init__(
        self,
        config: DecoderConfig,
        *,
        mesh: Mesh,
        placement: str | ExpertPlacement | Sequence[str | ExpertPlacement] = "linear",
        expert_axes: tuple[str, ...] = (EP,),
        dispatch: str | Mapping[str, str] | PhaseDispatch = "auto",
        kernels: str = "auto",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
        origin: Origin | None = None,
        one_of_alike: bool = False,
    ):
        instance_of("config", config, DecoderConfig, "a DecoderConfig")
        check_mesh(mesh)
        check_expert_axes(expert_axes)
        check_tp(config, mesh.shape[TP], expert_axes)
        self.config, self.mesh, self.dtype = config, mesh, jnp.dtype(dtype)
        self.origin = origin
        self._recorder: RoutingRecorder | None = None
        self.dispatch, self.kernels = PhaseDispatch.of(dispatch), kernels
        param = ParamFactory(mesh, dtype, rngs, kernels=kernels)
        experts = [ffn.num_experts for layer in config.layers if isinstance(ffn := layer.feed_forward, MoEConfig)]
        placements = dict(
            zip(
                config.moe_layers,
                make_placements(placement, experts, axes_size(mesh, expert_axes)),
                strict=True,
            )
        )
        self.embed = VocabTable(config.vocab_size, config.hidden_size, param=param)
        made: list[tuple[Any, DecoderLayer]] = []

        def make_layer(i: int, layer: LayerConfig) -> DecoderLayer:
            kind = DecoderLayer if i < config.num_main_layers else PredictionLayer
            alike = kind, layer, placements.get(i)
            if one_of_alike and (found := [own for other, own in made if other == alike]):
                return found[0]
            own = kind(
                layer,
                config,
                param=param,
                placement=placements.get(i),
                expert_axes=expert_axes,
                dispatch=self.dispatch,
                kernels=kernels,
            )
            made.append((alike, own))
            return own

        self.layers = nnx.List([make_layer(i, layer) for i, layer in enumerate(config.layers)])
        if config.streams is not None:
            _, one_of_all = STREAMS[type(config.streams)]
            self.hyper_head = one_of_all(config.streams, config.hidden_size, config.norm_eps, param=param)
        if config.final_norm:
            self.norm = NORMS[config.norm](config.hidden_size, config.norm_eps, param=param)
        if not config.tie_word_embeddings:
            self.lm_head = VocabTable(
                config.vocab_size, config.hidden_size, param=param, bias=config.lm_head_bias, embeds=False
            )

    @property
    def source(self) -> Path | None:
        """The checkpoint directory the model was loaded from; None for one with random weights."""
        return None if self.origin is None else self.origin.directory

    @property
    def load_report(self) -> Any:
        """The `jaxmoe.LoadReport` of the load that made this very model.

        None for one with random weights, and for copies (`nnx.clone`, `nnx.merge`): nothing was read for them.
        """
        return _LOAD_REPORTS.of(self)

    @load_report.setter
    def load_report(self, report: Any) -> None:
        _LOAD_REPORTS.give(self, report)

    @property
    def prediction_layers(self) -> list[PredictionLayer]:
        """The layers for multi-token prediction, which no token goes through on its way to the logits."""
        return [cast(PredictionLayer, layer) for layer in self.layers[self.config.num_main_layers :]]

    @property
    def moe_layers(self) -> list[MoE]:
        """The layers of routed experts, first to last, those for multi-token prediction too."""
        return [layer.moe for layer in self.layers if hasattr(layer, "moe")]

    @property
    def placements(self) -> list[ExpertPlacement]:
        """The placement of every MoE layer."""
        return [moe.placement for moe in self.moe_layers]

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters that are held beside the weights, see `jaxmoe.add_adapter`."""
        return () if self.adapter_places is None else self.adapter_places.names

    def adapter_ids(self, adapters: Sequence[str | None] | None, count: int) -> np.ndarray | None:
        """Give the number of each sequence's adapter, int32 [count], -1 for none; None where no sequence has one.

        Args:
            adapters: name or None for each sequence; None for none at all.
            count: number of sequences.

        Raises:
            ValueError: there are more or fewer names, or one is of no adapter of the model.
        """
        places = AdapterPlaces() if self.adapter_places is None else self.adapter_places
        return None if adapters is None else places.numbers(adapters, count)

    @property
    def recorder(self) -> RoutingRecorder | None:
        """The recorder of the `record_routing` that is active for this very model; a copy of it is not recorded."""
        recorder = self._recorder
        return recorder if recorder is not None and recorder.records(self, self.embed.weight.get_value()) else None

    def describe(self, *, batch_size: int = 1, prompt_length: int = 512) -> str:
        """The model on its mesh in a few lines: packed weights, kernels, where experts are, and how tokens travel to them.

        Args:
            batch_size: sequences, for the choice of a dispatch.
            prompt_length: tokens of the longest in the prefill.
        """
        check_usable(self, abstract=True)
        return describe(
            self.config,
            self.mesh,
            self.dtype,
            self.moe_layers,
            self.dispatch,
            describe_packed(self, self.dtype),
            describe_kernels(self, self.mesh, self.dtype, self.kernels),
            batch_size=batch_size,
            prompt_length=prompt_length,
        )

    @contextlib.contextmanager
    def record_routing(self, *, token_ids: bool = False, most_bytes: int | None = None) -> Iterator[RoutingRecorder]:
        """Record which experts are chosen by all that the model computes inside the ``with`` block.

        Counts cost next to nothing. Each step of `jaxmoe.generate`, and each call of the model, is one step of
        the record: a token is counted in the step that computes it, so a prompt's tokens once, and each generated
        token once but the one that reaches max_new_tokens, which the model never sees. Copies of the model are not
        recorded; the model inside `nnx.value_and_grad` is. Programs that record are compiled beside those that do not.
        However long it goes on, its memory is bounded: see `RoutingRecorder`.

        Args:
            token_ids: keep the choices of every token too, int32 [T, L, K] a step.
            most_bytes: bytes of host memory for these choices, 2 GiB by default; those of later steps are dropped, and
                `trace` says so.

        Raises:
            ValueError: `most_bytes` is no integer of at least 1, or is given without `token_ids`.
            RuntimeError: a recording is active already. Inside the block, a call that cannot be recorded: of the model in
                a program of your own (jit), or of its methods and layers alone. A function that closes over the model and
                was compiled before runs without asking, and is not recorded.

        Example:
            >>> with model.record_routing() as routing:
            ...     outs = jaxmoe.generate(model, prompts)
            >>> routing.trace().save("routing.npz")
        """
        check_usable(self)
        if self.recorder is not None:
            raise RuntimeError(
                "the model's routing is being recorded already: one `with model.record_routing()` at a time"
            )
        recorder = RoutingRecorder(token_ids=token_ids, most_bytes=most_bytes)
        self.record_with(recorder)
        try:
            yield recorder
        finally:
            recorder.stop()

    def record_with(self, recorder: RoutingRecorder | None) -> None:
        """Let a recorder see what the model computes until it stops; None for no recorder."""
        self._attach(recorder)
        if recorder is not None:
            recorder.models.append(self)

    def _attach(self, recorder: RoutingRecorder | None) -> None:
        self._recorder = recorder
        for moe in self.moe_layers:
            moe.recorder = recorder

    @contextlib.contextmanager
    def replay_routing(self, trace: RoutingTrace) -> Iterator[None]:
        """Take recorded choices of experts instead of the routers' own inside the ``with`` block.

        The routers still weight the chosen, and gradients reach them through the weights. The trace is of one run, on
        any mesh and placement, and every run inside the block replays it from its beginning:

        - A call of the model on [B, S] takes a trace of B · S tokens, row by row, in however many windows. It may be
          inside gradients, and inside programs of your own that take the model as an argument (`nnx.jit`); another trace
          of as many tokens compiles nothing again.
        - A call of `jaxmoe.generate` takes a trace of one: a window for the prefill, with the prompts' tokens one prompt
          after the other, and one for each decode step, with a token for each row that had not ended when it began.

        Padding is in no trace, neither that of rows nor of prompts. A token with -1 in all places is one that the router
        chooses for. `RoutingTrace.by_sequence` brings a generation into rows, to train on what was sampled.
        `logits_and_stats` and its like take choices as an argument, here as elsewhere.

        Args:
            trace: recorded with ``token_ids=True``, of a model with the same layers.

        Raises:
            ValueError: the trace has counts alone, or other layers, experts or choices than the model; inside the block,
                another number of tokens or steps than a run.
            RuntimeError: a trace is being replayed already; inside the block, a program that closes over the model
                instead of taking it. One that was compiled before runs without asking, and replays nothing.

        Example:
            >>> with model.record_routing(token_ids=True) as routing:
            ...     logits = model(token_ids)
            >>> with model.replay_routing(routing.trace()):
            ...     loss, gradients = nnx.value_and_grad(lambda model: -model(token_ids).max())(model)
        """
        if self.replay is not None:
            raise RuntimeError("a trace is being replayed already: one `with model.replay_routing(...)` at a time")
        self.replay = RoutingReplay(trace, [moe.config for moe in self.moe_layers], self.mesh)
        try:
            yield
        finally:
            del self.replay

    def split_network(self) -> tuple[nnx.GraphDef, nnx.State]:
        """`nnx.split` of the model without recorder, replay and origin, so that programs made of it know of none."""
        recorder, replay, origin = self._recorder, self.replay, self.origin
        self._attach(None)
        self.origin = None
        if replay is not None:
            del self.replay
        try:
            return nnx.split(self)
        finally:
            if replay is not None:
                self.replay = replay
            self.origin = origin
            self._attach(recorder)

    def rebalance(
        self,
        placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
        *,
        num_nodes: int = 1,
        optimizer: Any = None,
    ) -> MovedBytes:
        """Swap experts on the devices until they lie as `placement` says, see `jaxmoe.rebalance`.

        Example:
            >>> with model.record_routing() as routing:
            ...     outs = jaxmoe.generate(model, prompts)
            >>> placements = jaxmoe.ExpertPlacement.from_counts(routing.counts(), ep=4)
            >>> model.rebalance(placements).total > 0
            True
        """
        return rebalance_layers(self, self.moe_layers, placement, num_nodes=num_nodes, optimizer=optimizer)

    def choose_replicas(
        self, choice: str, *, counts: np.ndarray | None = None, devices_per_node: int | None = None
    ) -> None:
        """Say which replica a token goes to where its expert has several, see `jaxmoe.MoE.choose_replicas`.

        Args:
            choice: "modulo", "random", "local_first" or "least_loaded".
            counts: [L, E], what the experts of each MoE layer were given lately, for "least_loaded"; from
                `record_routing`.
            devices_per_node: devices of a node along `expert_axes`, for "local_first"; None for a single node.

        Raises:
            ValueError: the choice is unknown or the other arguments do not fit; nothing is changed then.
        """
        check_usable(self, abstract=True)
        loads = [None] * len(self.moe_layers) if counts is None else device_loads(np.asarray(counts), self.placements)
        rules = [
            ReplicaRule(choice=choice, devices_per_node=devices_per_node, last_load=last_load) for last_load in loads
        ]
        for moe, rule in zip(self.moe_layers, rules, strict=True):
            rule.tables(moe.placement)
        for moe, rule in zip(self.moe_layers, rules, strict=True):
            moe.choose_replicas(choice, devices_per_node=devices_per_node, last_load=rule.last_load)

    def __call__(
        self,
        token_ids: jax.Array | np.ndarray | Sequence[Sequence[int]],
        *,
        adapters: Sequence[str | None] | None = None,
    ) -> jax.Array:
        """Logits of every position.

        Args:
            token_ids: int32 [B, S], any B and S.
            adapters: name of an adapter for each row, or None for the model as it is; None for all as it is.

        Returns:
            float32 [B, S, vocab_size].

        Raises:
            ValueError: not two dims, no token, an id outside the vocabulary, a replayed trace of another size, an adapter
                that the model does not hold, or a sequence that the model's rotary frequencies do not hold for.
            RuntimeError: see `record_routing` and `replay_routing`.
        """
        check_usable(self)
        if not isinstance(token_ids, jax.core.Tracer):
            token_ids = np.asarray(token_ids)
            check_token_ids(token_ids, self.config.vocab_size)
        B, S = token_ids.shape
        check_length(self.config, S)
        # Padded to a few sizes, so that a series of calls compiles a few programs.
        rows, length = padded_batch(self.mesh, B), bucket_length(S)
        tokens_BS = jnp.pad(jnp.asarray(token_ids, jnp.int32), ((0, rows - B), (0, length - S)))
        lengths_B = jnp.where(jnp.arange(rows, dtype=jnp.int32) < B, jnp.int32(S), 0)
        expert_ids = None if self.replay is None else self.replay.of_call(B, S, rows, length)
        adapter_ids = self.adapter_ids(adapters, B)
        if adapter_ids is not None:
            adapter_ids = np.pad(adapter_ids, (0, rows - B), constant_values=-1)
        graphdef, replay, *rest = nnx.split(self, ReplayedRouting, ...)
        # The program takes the choices as they are padded, and no array of each trace's own size.
        replay = jax.tree.map(lambda _: jnp.int32(0), replay)
        recorder = self.recorder
        record = None if recorder is None else recorder.token_ids
        logits_BSV, routing = _all_logits(
            graphdef, record, (replay, *rest), tokens_BS, lengths_B, expert_ids, adapter_ids
        )
        if recorder is not None:
            recorder.add(routing)
        return logits_BSV[:B, :S]

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `batch_size` sequences (see `padded_batch`) of up to `max_length` tokens."""
        check_length(self.config, max_length)
        return self.empty_cache(self.layers[: self.config.num_main_layers], batch_size, max_length)

    def empty_cache(self, layers: Sequence[DecoderLayer], batch_size: int, max_length: int) -> Cache:
        """An empty cache for each of some layers."""
        arrays = tuple(layer.cache_arrays(batch_size, max_length) for layer in layers)
        return _empty(arrays, self.dtype, self.mesh, batch_axes(self.mesh, batch_size))

    def padded_batch(self, batch_size: int) -> int:
        """Rows to use for `batch_size` sequences, so that the batch splits evenly over the mesh."""
        return padded_batch(self.mesh, batch_size)

    def prefill(self, tokens_BS: jax.Array, lengths_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Run prompts and fill the cache.

        Args:
            tokens_BS: int32, padded on the right.
            lengths_B: int32, tokens of each prompt; 0 for a padding row.
            cache: cache from `init_cache`, of at least S positions.

        Returns:
            float32 [B, vocab_size], the logits after each prompt's last token, and the cache.
        """
        return self.prefill_and_stats(tokens_BS, lengths_B, cache)[:2]

    def prefill_and_stats(
        self,
        tokens_BS: jax.Array,
        lengths_B: jax.Array,
        cache: Cache,
        expert_ids_BSLK: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, tuple[MoEStats, ...]]:
        """`prefill`, and what each MoE layer did; with choices to take and adapters, as for `logits_and_stats`."""
        S = tokens_BS.shape[1]
        positions_BS, mask_BS = prompt_positions(lengths_B, S)
        x_BSD, cache, stats = self.hidden_and_stats(
            tokens_BS, positions_BS, mask_BS, cache, expert_ids_BSLK, adapter_ids_B
        )
        last_B1D = jnp.take_along_axis(x_BSD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
        return self.logits_of(last_B1D)[:, 0], cache, stats

    def decode(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache, active_B: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Run one more token of each sequence.

        Args:
            tokens_B: int32.
            positions_B: int32, where each token stands; the cache holds all positions before.
            cache: cache that `prefill` gave.
            active_B: bool, False for rows that go to no routed expert; all are active by default.

        Returns:
            float32 [B, vocab_size], the logits after each token, and the cache.
        """
        return self.decode_and_stats(tokens_B, positions_B, cache, active_B)[:2]

    def decode_and_stats(
        self,
        tokens_B: jax.Array,
        positions_B: jax.Array,
        cache: Cache,
        active_B: jax.Array | None = None,
        expert_ids_BLK: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, tuple[MoEStats, ...]]:
        """`decode`, and what each MoE layer did; with choices to take, one token's for each row, and adapters."""
        mask_B1 = jnp.ones((len(tokens_B), 1), bool) if active_B is None else active_B[:, None]
        ids_B1LK = None if expert_ids_BLK is None else expert_ids_BLK[:, None]
        x_B1D, cache, stats = self.hidden_and_stats(
            tokens_B[:, None], positions_B[:, None], mask_B1, cache, ids_B1LK, adapter_ids_B, decode=True
        )
        return self.logits_of(x_B1D)[:, 0], cache, stats

    def extend_and_stats(
        self,
        tokens_BS: jax.Array,
        first_B: jax.Array,
        lengths_B: jax.Array,
        cache: Cache,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, tuple[MoEStats, ...]]:
        """Run more tokens of prompts whose beginnings are in the cache; not for layers that take one token at a time.

        Args:
            tokens_BS: int32, padded on the right.
            first_B: int32, position of each row's first token; the cache has room for S from there on.
            lengths_B: int32, tokens of each row; 0 for a padding row.
            cache: cache that `prefill` or this has given.
            adapter_ids_B: adapters of the rows, as for `logits_and_stats`.

        Returns:
            float32 [B, vocab_size], the logits after each row's last token, the cache, and one `MoEStats` per MoE layer.
        """
        index_1S = jnp.arange(tokens_BS.shape[1], dtype=jnp.int32)[None]
        x_BSD, cache, stats = self.hidden_and_stats(
            tokens_BS,
            first_B[:, None] + index_1S,
            index_1S < lengths_B[:, None],
            cache,
            adapter_ids_B=adapter_ids_B,
            decode=True,
            lengths_B=lengths_B,
        )
        last_B1D = jnp.take_along_axis(x_BSD, jnp.maximum(lengths_B - 1, 0)[:, None, None], axis=1)
        return self.logits_of(last_B1D)[:, 0], cache, stats

    def logits_and_stats(
        self,
        tokens_BS: jax.Array,
        lengths_B: jax.Array,
        expert_ids_BSLK: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, tuple[MoEStats, ...]]:
        """Logits of every position, and what each MoE layer did; pure and traceable, for training and measuring.

        Args:
            tokens_BS: int32, padded on the right, B a number that `padded_batch` gives.
            lengths_B: int32, tokens of each row; 0 for a padding row.
            expert_ids_BSLK: int32, choices to take instead of the routers' own, for the L MoE layers and the largest of
                their K, see `jaxmoe.MoE`; what it has of padding counts for nothing.
            adapter_ids_B: int32, adapter of each row as `adapter_ids` numbers them, -1 for none; None for none at all.

        Returns:
            float32 [B, S, vocab_size], and one `MoEStats` per MoE layer.
        """
        positions_BS, mask_BS = prompt_positions(lengths_B, tokens_BS.shape[1])
        x_BSD, _, stats = self.hidden_and_stats(tokens_BS, positions_BS, mask_BS, None, expert_ids_BSLK, adapter_ids_B)
        return self.logits_of(x_BSD), stats

    def embedded(self, tokens_BS: jax.Array) -> jax.Array:
        """Embed tokens, [B, S, D], as the first layer sees them."""
        return self.embed.embed(tokens_BS, batch_axes(self.mesh, len(tokens_BS))) * self.config.embedding_multiplier

    def hidden_and_stats(
        self,
        tokens_BS: jax.Array,
        positions_BS: jax.Array,
        mask_BS: jax.Array,
        cache: Cache | None,
        expert_ids_BSLK: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
        *,
        decode: bool = False,
        lengths_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache, tuple[MoEStats, ...]]:
        """Run tokens through the model's own layers and its last norm.

        Args:
            tokens_BS: int32.
            positions_BS: int32, as `TokenMixer` has them.
            mask_BS: bool, False for tokens that go to no routed expert.
            cache: cache that gets the tokens; None for none.
            expert_ids_BSLK: choices to take, as for `logits_and_stats`.
            adapter_ids_B: adapters of the rows, as for `logits_and_stats`.
            decode: whether the cache holds all positions before. With S > 1 it comes back with what `accepted` chooses from.
            lengths_B: int32, tokens of each row that count, with S > 1 in `decode`: the cache comes back as they left it.

        Returns:
            [B, S, D], the cache, and one `MoEStats` for each MoE layer that a token goes through.
        """
        check_usable(self)
        batch = batch_axes(self.mesh, tokens_BS.shape[0])
        x_BSD = self.embedded(tokens_BS)
        if self.config.streams is not None:
            x_BSD = jnp.repeat(x_BSD[:, :, None], self.config.streams.streams, axis=2)
        choices = iter(of_layers(expert_ids_BSLK, [moe.config for moe in self.moe_layers], tokens_BS.shape))
        caches, stats, passed = [], [], Passed()
        for i, layer in enumerate(self.layers[: self.config.num_main_layers]):
            layer_cache = None if cache is None else cache[i]
            ids_BSK = next(choices) if hasattr(layer, "moe") else None
            x_BSD, layer_cache, layer_stats, passed = layer(
                x_BSD,
                positions_BS,
                mask_BS,
                layer_cache,
                batch,
                expert_ids_BSK=ids_BSK,
                decode=decode,
                passed=passed,
                token_ids_BS=tokens_BS,
                lengths_B=lengths_B,
                adapter_ids_B=adapter_ids_B,
            )
            caches.append(layer_cache)
            if layer_stats is not None:
                stats.append(layer_stats)
        if self.config.streams is not None:
            x_BSD = self.hyper_head(x_BSD)
        return self.norm(x_BSD) if self.config.final_norm else x_BSD, tuple(caches), tuple(stats)

    def logits_of(self, x_BSD: jax.Array) -> jax.Array:
        """Project what the last norm gives, [B, S, D], to float32 [B, S, vocab_size]."""
        table = self.embed if self.config.tie_word_embeddings else self.lm_head
        logits_BSV = table.logits(x_BSD, batch_axes(self.mesh, x_BSD.shape[0])) / self.config.logits_scaling
        softcap = self.config.logits_softcap
        return logits_BSV if softcap is None else softcap * jnp.tanh(logits_BSV / softcap)


@partial(jax.jit, static_argnums=(0, 1))
def _all_logits(
    graphdef: nnx.GraphDef,
    token_ids: bool | None,
    states: tuple[nnx.State, ...],
    tokens_BS: jax.Array,
    lengths_B: jax.Array,
    expert_ids_BSLK: jax.Array | None,
    adapter_ids_B: jax.Array | None,
) -> tuple[jax.Array, Routing | None]:
    model = nnx.merge(graphdef, *states)
    model.record_with(None)  # This program hands out its routing itself.
    logits_BSV, stats = model.logits_and_stats(tokens_BS, lengths_B, expert_ids_BSLK, adapter_ids_B)
    if token_ids is None:
        return logits_BSV, None
    return logits_BSV, routing_of(stats, model.mesh, token_ids=token_ids, num_layers=len(model.moe_layers))


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(arrays: Any, dtype: jnp.dtype, mesh: Mesh, batch: tuple[str, ...]) -> Cache:
    def one(array: CacheArray) -> jax.Array:
        return jax.lax.with_sharding_constraint(
            jnp.zeros(array.shape, array.dtype or dtype), named(mesh, *array.spec(batch))
        )

    return jax.tree.map(one, arrays)
