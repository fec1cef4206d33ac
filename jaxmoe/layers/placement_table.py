"""A layer's placement as arrays: what compiled programs read, and what the host reads the placement back from.

The placement is in a module's state and nowhere else. So `nnx.split`, `nnx.clone`, `nnx.jit`, a checkpoint and all else
that moves state takes it along with the weights that lie by it, and no program is compiled again where it changes.
"""

from functools import lru_cache

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxmoe.layers.replicas import ReplicaRule
from jaxmoe.mesh import named, put
from jaxmoe.placement import ExpertPlacement


class PlacementTable(nnx.Variable):
    """Placement as arrays the compiled program reads, so that it can change without a recompilation."""


def placement_tables(
    placement: ExpertPlacement, rule: ReplicaRule, mesh: Mesh, expert_axes: tuple[str, ...]
) -> dict[str, PlacementTable]:
    """The tables of a layer by name.

    Returns:
        `slot_to_expert`, int32 [P], the placement itself; `expert_to_slots`, int32 [E, R], and `replica_counts`,
        int32 [E], what it makes of any device's tokens. For "local_first" `near_slots` [n, E, R] and `near_counts`
        [n, E] with a part for each of the n devices; for "least_loaded" `last_load`, float32 [n].
    """
    whole, per_device = named(mesh), named(mesh, expert_axes)
    nearest = rule.choice == "local_first"
    # What holds for every device is kept once, the tables of "local_first" with their devices.
    slots, counts = (ReplicaRule() if nearest else rule).tables(placement)
    slot_to_expert = put(placement.slot_to_expert, whole)
    # On devices that are not there the table has no values to read it from; such a layer computes nothing either.
    planned = placement if isinstance(slot_to_expert, jax.ShapeDtypeStruct) else None
    tables = {
        "slot_to_expert": PlacementTable(slot_to_expert, planned=planned),
        "expert_to_slots": PlacementTable(put(slots[0], whole)),
        "replica_counts": PlacementTable(put(counts[0], whole)),
    }
    if nearest:
        slots, counts = rule.tables(placement)
        tables["near_slots"] = PlacementTable(put(slots, per_device))
        tables["near_counts"] = PlacementTable(put(counts, per_device))
    if rule.last_load is not None:
        tables["last_load"] = PlacementTable(put(np.asarray(rule.last_load, np.float32), whole))
    return tables


def read_placement(table: PlacementTable, num_experts: int, ep: int) -> ExpertPlacement:
    """The placement that `slot_to_expert` says.

    Raises:
        ValueError: it has no values to read: traced, abstract, or of several layers at once.
    """
    value = table.get_value()
    if (planned := table.get_metadata().get("planned")) is not None:
        return planned
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            "a layer's placement is read on the host, and inside a transformation of JAX (jit, grad, vmap, scan, "
            "eval_shape) its tables are traced; read layer.placement outside of it"
        )
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(
            "a layer's placement is read from its tables, and those of this layer are abstract (from nnx.eval_shape or "
            "jax.eval_shape); fill its whole state first, placement tables too"
        )
    if value.ndim != 1:
        raise ValueError(
            f"a layer's placement is read from slot_to_expert [P]; got shape {value.shape}, that of layers stacked by "
            "nnx.vmap or nnx.scan; take one layer's part of every array (nnx.split, jax.tree.map, nnx.merge)"
        )
    return _placement(num_experts, ep, np.asarray(value).astype(np.int32).tobytes())


@lru_cache(maxsize=1024)
def _placement(num_experts: int, ep: int, slots: bytes) -> ExpertPlacement:
    """Made once for all that say the same: a balancer asks at every step, and its tables are costly."""
    return ExpertPlacement(num_experts, ep, np.frombuffer(slots, np.int32))
