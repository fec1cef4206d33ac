"""Recording which experts a model's tokens choose, while it runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.checks import integer
from jaxmoe.layers import MoEStats
from jaxmoe.mesh import named
from jaxmoe.placement import RoutingTrace

# Windows that a record of counts has at most, an even number.
MOST_WINDOWS = 1024
# Bytes of tokens' choices, where nobody says otherwise.
MOST_BYTES = 2**31


class Routing(NamedTuple):
    """Choices of the tokens of one step, on the devices.

    Attributes:
        counts: int32 [L, E], number of (token, choice) pairs that went to each logical expert of each MoE layer.
        expert_ids: int32 [T, L, K], choices of each token, -1 for none and -2 for a zero expert; None where only counts are
            wanted.
    """

    counts: jax.Array
    expert_ids: jax.Array | None


def routing_of(stats: Sequence[MoEStats], mesh: Mesh, *, token_ids: bool, num_layers: int | None = None) -> Routing:
    """Gather the layers' statistics; layers with fewer experts or choices are filled up with zeros or -1.

    Args:
        stats: statistics of the layers that were run, first to last.
        mesh: mesh that they are on.
        token_ids: whether each token's choices are wanted.
        num_layers: number of MoE layers of the model, of which the last may not have been run: no token went to their
            experts. None for as many as `stats`.

    Raises:
        ValueError: there is no MoE layer.
    """
    if not stats:
        raise ValueError("no layer of this model has routed experts: there is no routing to record or to balance")
    E = max(layer.expert_counts.shape[0] for layer in stats)
    idle = max(num_layers or 0, len(stats)) - len(stats)
    counts = jnp.stack([jnp.pad(layer.expert_counts, (0, E - layer.expert_counts.shape[0])) for layer in stats])
    counts = jnp.pad(counts, ((0, idle), (0, 0)))
    if not token_ids:
        return Routing(counts, None)
    K = max(layer.expert_ids.shape[1] for layer in stats)
    # A trace is of experts that are somewhere.
    chosen = [jnp.where(layer.expert_ids < layer.expert_counts.shape[0], layer.expert_ids, -2) for layer in stats]
    ids = [jnp.pad(ids_TK, ((0, 0), (0, K - ids_TK.shape[1])), constant_values=-1) for ids_TK in chosen]
    # On every device, so that each process can read all of them.
    ids_TLK = jnp.pad(jnp.stack(ids, axis=1), ((0, 0), (0, idle), (0, 0)), constant_values=-1)
    return Routing(counts, jax.lax.with_sharding_constraint(ids_TLK, named(mesh)))


class RoutingRecorder:
    """The routing of everything a model computes while it is recorded; see `Decoder.record_routing`.

    A model that is recorded has its recorder as a plain attribute, and so another structure than one that is not: a
    program that was compiled around a call without recording is not taken for one with it. Which recorder it is makes no
    difference: all of them compare equal.

    However long it records, it takes a bounded amount of memory. Counts are kept in up to 1024 windows: where they are full,
    each two become one, and a window is twice as many steps from then on. Choices of tokens are kept up to `most_bytes`;
    those of later steps are dropped, their counts added up all the same, and `trace` says so.

    Args:
        token_ids: whether each token's choices are kept, and not only counts.
        most_bytes: bytes of host memory for these choices; None for 2 GiB.

    Raises:
        ValueError: `most_bytes` is no integer of at least 1, or there are no choices that it would bound.

    Attributes:
        token_ids, most_bytes: the arguments.
        active: whether it records, until `stop`.
        models: models that it records; more than one where a model was moved meanwhile.
        num_steps: steps recorded so far: prefills, decode steps, and calls of the model.
        steps_per_window: steps that a window of a trace of counts stands for; the last window may have fewer.
        dropped_steps: last steps whose tokens' choices were dropped.
    """

    def __init__(self, *, token_ids: bool, most_bytes: int | None = None):
        if most_bytes is not None and not token_ids:
            raise ValueError(
                f"most_bytes is for the choices of tokens; got {most_bytes} with token_ids=False: a record of counts is "
                "bounded by itself, leave most_bytes out"
            )
        self.token_ids, self.active = token_ids, True
        self.models: list[Any] = []
        self.num_steps = self.dropped_steps = 0
        self.steps_per_window = 1
        self.most_bytes = MOST_BYTES if most_bytes is None else integer("most_bytes", most_bytes, least=1)
        self._bytes = 0
        self._counts_LE: np.ndarray | None = None
        self._windows: list[np.ndarray] = []  # int64 [L, E] each
        self._chosen: list[np.ndarray] = []  # int32 [T, L, K] of each step

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RoutingRecorder)

    def __hash__(self) -> int:
        return hash(RoutingRecorder)

    def __deepcopy__(self, memo: dict) -> "RoutingRecorder":
        return self  # A copy of a recorded model is none of `models`, and so not recorded.

    def records(self, module: nnx.Module, value: Any) -> bool:
        """Whether `module`, which has this recorder and `value` among its arrays, is recorded.

        It is where it is one of `models` or a layer of one, and not where it is a copy. Inside a program nothing tells the
        two apart: there it counts as recorded, and `add` says what it thinks of that.
        """
        own = (each for model in self.models for each in (model, *model.moe_layers))
        return self.active and (isinstance(value, jax.core.Tracer) or any(module is each for each in own))

    def stop(self) -> None:
        """End the recording."""
        self.active = False
        for model in self.models:
            model.record_with(None)
        self.models.clear()

    def add(self, routing: Routing) -> None:
        """Keep the routing of one step, in host memory, as far as there is room.

        Raises:
            RuntimeError: it is inside a program that is being compiled, and has no values.
        """
        if isinstance(routing.counts, jax.core.Tracer):
            raise RuntimeError(
                "routing is recorded of model(tokens) and jaxmoe.generate as they run, and this call is inside a program "
                "of your own (jit, vmap or the like); call the model outside of it, or end the recording and let the "
                "program return the statistics of model.logits_and_stats"
            )
        counts_LE = np.asarray(routing.counts, np.int64)
        self._counts_LE = counts_LE if self._counts_LE is None else self._counts_LE + counts_LE
        if self.token_ids:
            self._keep_choices(_chosen(np.asarray(routing.expert_ids)))
        else:
            self._keep_counts(counts_LE)
        self.num_steps += 1

    def _keep_choices(self, ids_TLK: np.ndarray) -> None:
        self._bytes += ids_TLK.nbytes
        if self._bytes > self.most_bytes:  # no later step is kept either: what is kept has no gap
            self.dropped_steps += 1
        else:
            self._chosen.append(ids_TLK)

    def _keep_counts(self, counts_LE: np.ndarray) -> None:
        if self.num_steps % self.steps_per_window:
            self._windows[-1] = self._windows[-1] + counts_LE
            return
        if len(self._windows) == MOST_WINDOWS:
            pairs = zip(self._windows[::2], self._windows[1::2], strict=True)
            self._windows = [first + second for first, second in pairs]
            self.steps_per_window *= 2
        self._windows.append(counts_LE)

    def counts(self) -> np.ndarray:
        """Add up the counts of all steps, int64 [L, E].

        Raises:
            ValueError: nothing was recorded.
        """
        if self._counts_LE is None:
            raise ValueError(
                "no step was recorded; run the model or jaxmoe.generate inside `with model.record_routing()`"
            )
        return self._counts_LE.copy()

    def trace(self, *, incomplete: bool = False) -> RoutingTrace:
        """Make a trace; `RoutingTrace.save` keeps it, `jaxmoe place` reads it.

        Each step is a window, or of many steps of counts each `steps_per_window` are.

        Args:
            incomplete: whether the first steps alone will do, where the choices of later ones were dropped.

        Raises:
            ValueError: nothing was recorded, or choices were dropped.
        """
        E = self.counts().shape[1]
        if not self.token_ids:
            return RoutingTrace(counts=np.stack(self._windows))
        if self.dropped_steps and not (incomplete and self._chosen):
            raise ValueError(
                f"the choices of all tokens fit in most_bytes ({self.most_bytes:,} bytes); those of the last "
                f"{self.dropped_steps} of {self.num_steps} steps did not, and were dropped: take counts(), which has all "
                "steps, or trace(incomplete=True), which has the first ones; or record fewer steps, or with a larger "
                "most_bytes"
            )
        return RoutingTrace.from_expert_ids(np.concatenate(self._chosen), E, window=[len(ids) for ids in self._chosen])


def _chosen(ids_TLK: np.ndarray) -> np.ndarray:
    """Leave out tokens that chose nothing, as padding does; zero experts become -1, for they are no choice of an expert."""
    return np.maximum(ids_TLK[(ids_TLK != -1).any(axis=(1, 2))], -1)
