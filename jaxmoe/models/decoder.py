"""`Decoder`: the model of every family, with what a person does with it beside computing logits."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.config import DecoderConfig
from jaxmoe.dispatch import PhaseDispatch
from jaxmoe.layers import MovedBytes, ReplicaRule, check_usable, rebalance_layers
from jaxmoe.mesh import EP, padded_batch
from jaxmoe.models.adapters import AdapterPlaces
from jaxmoe.models.belongings import Belongings
from jaxmoe.models.checks import check_length, check_token_ids
from jaxmoe.models.describe import describe
from jaxmoe.models.network import DecoderNetwork
from jaxmoe.models.origin import Origin
from jaxmoe.models.padding import bucket_length
from jaxmoe.models.replay import ReplayedRouting, RoutingReplay
from jaxmoe.models.routing import Routing, RoutingRecorder, routing_of
from jaxmoe.placement import ExpertPlacement, RoutingTrace
from jaxmoe.placement.traffic import device_loads

_LOAD_REPORTS: Belongings[Any] = Belongings()


class Decoder(DecoderNetwork):
    """A decoder-only transformer on a (dp, tp, ep) mesh.

    `DecoderNetwork` has its layers and the methods that programs are made of.

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
        super().__init__(
            config,
            mesh=mesh,
            placement=placement,
            expert_axes=expert_axes,
            dispatch=PhaseDispatch.of(dispatch),
            kernels=kernels,
            dtype=dtype,
            rngs=rngs,
            one_of_alike=one_of_alike,
        )
        self.origin = origin
        self._recorder: RoutingRecorder | None = None

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

    def describe(self, *, batch_size: int = 1, prompt_length: int = 512) -> str:
        """The model on its mesh in a few lines: packed weights, kernels, where experts are, and how tokens travel to them.

        Args:
            batch_size: sequences, for the choice of a dispatch.
            prompt_length: tokens of the longest in the prefill.
        """
        check_usable(self, abstract=True)
        return describe(self, batch_size=batch_size, prompt_length=prompt_length)

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
