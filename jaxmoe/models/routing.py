"""Recording which experts a model's tokens choose, while it runs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.layers import MoEStats
from jaxmoe.mesh import named
from jaxmoe.placement import RoutingTrace


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

    Attributes:
        token_ids: whether each token's choices are kept, and not only counts.
        active: whether it records, until `stop`.
        models: models that it records; more than one where a model was moved meanwhile.
    """

    def __init__(self, *, token_ids: bool):
        self.token_ids, self.active = token_ids, True
        self.models: list[Any] = []
        self._steps: list[Routing] = []

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

    @property
    def num_steps(self) -> int:
        """Steps recorded so far: prefills, decode steps, and calls of the model."""
        return len(self._steps)

    def add(self, routing: Routing) -> None:
        """Keep the routing of one step, in host memory.

        Raises:
            RuntimeError: it is inside a program that is being compiled, and has no values.
        """
        if isinstance(routing.counts, jax.core.Tracer):
            raise RuntimeError(
                "routing is recorded of model(tokens) and jaxmoe.generate as they run, and this call is inside a program "
                "of your own (jit, vmap or the like); call the model outside of it, or end the recording and let the "
                "program return the statistics of model.logits_and_stats"
            )
        self._steps.append(jax.tree.map(np.asarray, routing))

    def counts(self) -> np.ndarray:
        """Add up the counts of all steps, int64 [L, E].

        Raises:
            ValueError: nothing was recorded.
        """
        return self.trace().total_counts

    def trace(self) -> RoutingTrace:
        """Make a trace of the steps, one window for each; `RoutingTrace.save` keeps it, `jaxmoe place` reads it.

        Raises:
            ValueError: nothing was recorded.
        """
        if not self._steps:
            raise ValueError(
                "no step was recorded; run the model or jaxmoe.generate inside `with model.record_routing()`"
            )
        if not self.token_ids:
            return RoutingTrace(counts=np.stack([step.counts for step in self._steps]))
        tokens = [_chosen(np.asarray(step.expert_ids)) for step in self._steps]
        return RoutingTrace.from_expert_ids(
            np.concatenate(tokens), self._steps[0].counts.shape[1], window=[len(ids) for ids in tokens]
        )


def _chosen(ids_TLK: np.ndarray) -> np.ndarray:
    """Leave out tokens that chose nothing, as padding does; zero experts become -1, for they are no choice of an expert."""
    return np.maximum(ids_TLK[(ids_TLK != -1).any(axis=(1, 2))], -1)
