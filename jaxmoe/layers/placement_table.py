"""A layer's placement as arrays: compiled programs read them, and the host reads the placement back from them.

The placement is in a module's state and nowhere else. So `nnx.split`, `nnx.clone`, `nnx.jit`, a checkpoint and all else
that moves state takes it along with the weights that lie by it, and no program is compiled again where it changes.
"""

from functools import lru_cache

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.layers.replicas import PlacementTables, ReplicaRule
from jaxmoe.mesh import put
from jaxmoe.placement import ExpertPlacement


class PlacementTable(nnx.Variable):
    """An array that the compiled program reads the placement from, so that it can change without a recompilation."""


def table_specs(expert_axes: tuple[str, ...]) -> PlacementTables:
    """The partition specs of a layer's tables: the near ones lie with their devices, the others whole on every device."""
    whole, per_device = P(), P(expert_axes)
    return PlacementTables(whole, whole, whole, near_slots=per_device, near_counts=per_device, last_load=whole)


def placement_tables(
    placement: ExpertPlacement, rule: ReplicaRule, mesh: Mesh, expert_axes: tuple[str, ...]
) -> PlacementTables:
    """Make the tables of a layer, as variables."""
    shardings = PlacementTables(*[NamedSharding(mesh, spec) for spec in table_specs(expert_axes)])
    nearest = rule.choice == "local_first"
    # What holds for every device is kept once, the tables of "local_first" with their devices.
    slots, counts = (ReplicaRule() if nearest else rule).tables(placement)
    slot_to_expert = put(placement.slot_to_expert, shardings.slot_to_expert)
    # On devices that are not there the table has no values to read it from; such a layer computes nothing either.
    planned = placement if isinstance(slot_to_expert, jax.ShapeDtypeStruct) else None
    tables = PlacementTables(
        PlacementTable(slot_to_expert, planned=planned),
        PlacementTable(put(slots[0], shardings.expert_to_slots)),
        PlacementTable(put(counts[0], shardings.replica_counts)),
    )
    if nearest:
        slots, counts = rule.tables(placement)
        tables = tables._replace(
            near_slots=PlacementTable(put(slots, shardings.near_slots)),
            near_counts=PlacementTable(put(counts, shardings.near_counts)),
        )
    if rule.last_load is not None:
        last_load = np.asarray(rule.last_load, np.float32)
        tables = tables._replace(last_load=PlacementTable(put(last_load, shardings.last_load)))
    return tables


def hold_tables(layer: nnx.Module, tables: PlacementTables) -> None:
    """Give a layer these tables instead of those that it has."""
    for name, table in tables._asdict().items():
        if table is None:
            if hasattr(layer, name):
                delattr(layer, name)
        elif hasattr(layer, name):
            # The variable stays: another module may share it (nnx.clone(variables=False)), as it does the stacks.
            getattr(layer, name).set_value(table.get_value())
        else:
            setattr(layer, name, table)


def read_placement(table: PlacementTable, num_experts: int, ep: int) -> ExpertPlacement:
    """Read the placement that `slot_to_expert` says.

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
    """Make a placement once for all that say the same: a balancer asks at every step, and its tables are costly."""
    return ExpertPlacement(num_experts, ep, np.frombuffer(slots, np.int32))
