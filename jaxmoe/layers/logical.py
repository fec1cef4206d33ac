"""The parameters of a module in logical order: the same arrays on every mesh and by every placement.

An expert stack [P, ...] lies by its layer's placement: slots in any order, replicas, padding. Here it is [E, ...], expert e
at index e; so key/value heads that are copied for tp are there once, and padding is left out. What is saved this way from
one mesh and placement is loaded on any other.

Dim 0 is sharded like the slots where E divides evenly, and where it does not the last dim that does is sharded instead.
One expert after the other goes from its device to those that keep a part of it, so a device needs room for its part of
the result and for one expert.
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxmoe.layers.expert_stack import ExpertStack
from jaxmoe.layers.param import RowMap
from jaxmoe.layers.specs import layer_of_stack
from jaxmoe.layers.usable import check_usable
from jaxmoe.mesh import axes_size
from jaxmoe.placement import ExpertPlacement


def logical_state(module: nnx.Module) -> dict[str, jax.Array]:
    """Give the parameters of a module in logical order, for a checkpoint that any mesh and placement can load.

    Where nothing is to be reordered the array is the module's own, so do not donate what this gives. Of replicas that
    have grown apart in training the one in the lowest slot is taken.

    Args:
        module: `jaxmoe.MoE`, model, or any module with such layers in it.

    Returns:
        {dotted path: array}, sharded over the module's mesh.

    Raises:
        RuntimeError: its weights are gone, or it never had any.
        ValueError: several layers are stacked in one module (nnx.vmap).

    Example:
        >>> import orbax.checkpoint as ocp
        >>> directory = Path("checkpoint-7").absolute()
        >>> with ocp.StandardCheckpointer() as checkpointer:
        ...     checkpointer.save(directory, jaxmoe.logical_state(model))
        >>> other = jaxmoe.load("demo", mesh=jaxmoe.make_mesh(ep=8))
        >>> with ocp.StandardCheckpointer() as checkpointer:
        ...     saved = checkpointer.restore(directory, jaxmoe.abstract_logical_state(other))
        >>> jaxmoe.load_logical_state(other, saved)
    """
    check_usable(module)
    return {
        path: param.get_value() if order is None else order.to_logical(param.get_value())
        for path, (param, order) in _ordered(module).items()
    }


def abstract_logical_state(module: nnx.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """Give shapes, dtypes and shardings of `logical_state`, the target of a restore; nothing is computed."""
    check_usable(module, abstract=True)
    return {path: _abstract(param, order) for path, (param, order) in _ordered(module).items()}


def load_logical_state(module: nnx.Module, state: Mapping[str, Any]) -> None:
    """Fill a module from the parameters that `logical_state` gave, of this module or another one like it.

    Args:
        module: module on any mesh, by any placement, with values or without.
        state: arrays of all its parameters, on any devices or on the host.

    Raises:
        ValueError: a parameter is missing or unknown, or has another shape or dtype; nothing is changed then.
    """
    check_usable(module, abstract=True)
    ordered = _ordered(module)
    wanted = {path: _abstract(param, order) for path, (param, order) in ordered.items()}
    if unlike := sorted(wanted.keys() ^ state.keys()):
        where = "the module has, the state has not" if unlike[0] in wanted else "the state has, the module has not"
        raise ValueError(
            f"a logical state has every parameter of the module once: {where} {unlike[0]!r} ({len(unlike)} such in all); "
            "take it from a module of the same config with jaxmoe.logical_state"
        )
    for path, spec in wanted.items():
        shape, dtype = np.shape(state[path]), np.dtype(state[path].dtype)
        if (shape, dtype) != (spec.shape, spec.dtype):
            raise ValueError(
                f"{path} is {spec.dtype.name} {spec.shape} in logical order; got {dtype.name} {shape}; cast it, or make "
                "the module with the config and dtype that the state was saved with"
            )
    for path, (param, order) in ordered.items():
        old = param.get_value()
        if isinstance(old, jax.Array) and not old.committed:
            # As the module's author left it: on one device for now, and free to go where it is used.
            param.set_value(jnp.asarray(np.asarray(state[path])))
            continue
        value = jax.device_put(state[path], wanted[path].sharding)
        param.set_value(value if order is None else order.to_physical(value))
        if isinstance(order, _Slots) and isinstance(param, ExpertStack):
            param.note_slots(tuple(order.placement.slot_to_expert.tolist()))


class _Rows(NamedTuple):
    """A parameter whose rows a checkpoint has in another number."""

    rows: RowMap
    sharding: NamedSharding

    def shape(self, physical: tuple[int, ...]) -> tuple[int, ...]:
        groups = self.rows.source_groups * self.rows.copies + self.rows.padding
        return physical[0] // groups * self.rows.source_groups, *physical[1:]

    def to_logical(self, value: jax.Array) -> jax.Array:
        return self._run(_first_copies, value, _even(self.shape(value.shape), self.sharding))

    def to_physical(self, value: jax.Array) -> jax.Array:
        return self._run(_copied, value, self.sharding)

    def _run(self, function: Any, value: jax.Array, sharding: NamedSharding) -> jax.Array:
        return jax.jit(function, static_argnames="rows", out_shardings=sharding)(value, rows=self.rows)


class _Slots(NamedTuple):
    """An expert stack."""

    placement: ExpertPlacement
    sharding: NamedSharding
    expert_axes: tuple[str, ...]

    def shape(self, physical: tuple[int, ...]) -> tuple[int, ...]:
        return self.placement.num_experts, *physical[1:]

    def to_logical(self, value: jax.Array) -> jax.Array:
        if self._is_logical:
            return value
        first_slots = jnp.asarray(self.placement.expert_to_slots[:, 0])
        return _to_logical(value, first_slots, over=self._over(self.shape(value.shape)))

    def to_physical(self, value: jax.Array) -> jax.Array:
        if self._is_logical:
            return value
        return _to_physical(value, jnp.asarray(self.placement.slot_to_expert), over=self._over(value.shape))

    @property
    def _is_logical(self) -> bool:
        return np.array_equal(self.placement.slot_to_expert, np.arange(self.placement.num_experts))

    def _over(self, shape: tuple[int, ...]) -> "_Over":
        return _Over(self.sharding.mesh, self.sharding.spec, _even(shape, self.sharding).spec, self.expert_axes)


_Order = _Rows | _Slots


def _ordered(module: nnx.Module) -> dict[str, tuple[nnx.Param, _Order | None]]:
    """The parameters by path, each with what brings it into logical order; None where it is."""
    ordered: dict[str, tuple[nnx.Param, _Order | None]] = {}
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        layer, rows = layer_of_stack(module, path), param.get_metadata().get("rows")
        order: _Order | None = None
        if layer is not None:
            order = _Slots(layer.placement, param.get_value().sharding, layer.expert_axis_names)
        elif rows is not None:
            order = _Rows(rows, param.get_value().sharding)
        ordered[".".join(map(str, path))] = param, order
    return ordered


def _abstract(param: nnx.Param, order: _Order | None) -> jax.ShapeDtypeStruct:
    value = param.get_value()
    if order is None:
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
    shape = order.shape(value.shape)
    return jax.ShapeDtypeStruct(shape, value.dtype, sharding=_even(shape, order.sharding))


def _even(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """`sharding` where dim 0 divides; else with dim 0's axes on the last dim that they divide, or on none."""
    mesh, spec = sharding.mesh, [_axes(dim) for dim in sharding.spec]
    spec += [()] * (len(shape) - len(spec))
    if shape[0] % _size(mesh, spec[0]):
        moved, spec[0] = spec[0], ()
        for dim in reversed(range(1, len(shape))):
            if shape[dim] % _size(mesh, spec[dim] + moved) == 0:
                spec[dim] += moved
                break
    return NamedSharding(mesh, PartitionSpec(*[axes or None for axes in spec]))


def _axes(dim: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if dim is None else (dim,) if isinstance(dim, str) else tuple(dim)


def _size(mesh: Any, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _first_copies(value: jax.Array, *, rows: RowMap) -> jax.Array:
    groups = rows.source_groups * rows.copies
    group = value.shape[0] // (groups + rows.padding)
    held = value[: groups * group].reshape(rows.source_groups, rows.copies, group, *value.shape[1:])
    return held[:, 0].reshape(-1, *value.shape[1:])


def _copied(value: jax.Array, *, rows: RowMap) -> jax.Array:
    groups = value.reshape(rows.source_groups, 1, -1, *value.shape[1:])
    copies = jnp.repeat(groups, rows.copies, axis=1).reshape(-1, *value.shape[1:])
    padding = rows.padding * (value.shape[0] // rows.source_groups)
    return jnp.pad(copies, ((0, padding), *[(0, 0)] * (value.ndim - 1)))


class _Over(NamedTuple):
    """Partition specs of an expert stack in both orders."""

    mesh: Mesh | AbstractMesh
    physical: PartitionSpec
    logical: PartitionSpec
    expert_axes: tuple[str, ...]

    @property
    def split_dim(self) -> int | None:
        """The dim of the logical stack that is split over the expert axes; None where each device has all of it."""
        for dim, axes in enumerate(self.logical):
            if set(self.expert_axes) <= set(_axes(axes)):
                return dim
        return None


@partial(jax.jit, static_argnames="over")
def _to_logical(stack: jax.Array, first_slots_E: jax.Array, *, over: _Over) -> jax.Array:
    dtype, stack = stack.dtype, _for_collectives(stack)
    E, n, dim = len(first_slots_E), axes_size(over.mesh, over.expert_axes), over.split_dim

    def local(stack: jax.Array, first_slots_E: jax.Array) -> jax.Array:
        rank, p = jax.lax.axis_index(over.expert_axes), len(stack)

        def one(e: jax.Array, kept: jax.Array) -> jax.Array:
            slot = first_slots_E[e]
            mine = jax.lax.dynamic_index_in_dim(stack, slot % p)
            expert = jax.lax.psum(jnp.where(slot // p == rank, mine, 0), over.expert_axes)
            if dim == 0:
                there = jax.lax.dynamic_index_in_dim(kept, e % len(kept))
                return _write(kept, jnp.where(e // len(kept) == rank, expert, there), e % len(kept))
            if dim is not None:
                width = expert.shape[dim] // n
                expert = jax.lax.dynamic_slice_in_dim(expert, rank * width, width, dim)
            return _write(kept, expert, e)

        shape = [E, *stack.shape[1:]]
        if dim is not None:
            shape[dim] //= n
        return jax.lax.fori_loop(np.int32(0), np.int32(E), one, jnp.zeros(shape, stack.dtype))

    logical = jax.shard_map(
        local, mesh=over.mesh, in_specs=(over.physical, PartitionSpec()), out_specs=over.logical, check_vma=False
    )(stack, first_slots_E)
    return jax.lax.bitcast_convert_type(logical, dtype)


@partial(jax.jit, static_argnames="over")
def _to_physical(experts: jax.Array, slot_to_expert_P: jax.Array, *, over: _Over) -> jax.Array:
    dtype, experts = experts.dtype, _for_collectives(experts)
    n, dim = axes_size(over.mesh, over.expert_axes), over.split_dim
    p = len(slot_to_expert_P) // n

    def local(experts: jax.Array, slot_to_expert_P: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index(over.expert_axes)

        def one(slot: jax.Array, stack: jax.Array) -> jax.Array:
            e = jnp.maximum(slot_to_expert_P[slot], 0)
            expert = jax.lax.dynamic_index_in_dim(experts, e % len(experts))
            if dim == 0:
                expert = jax.lax.psum(jnp.where(e // len(experts) == rank, expert, 0), over.expert_axes)
            elif dim is not None:
                expert = jax.lax.all_gather(expert, over.expert_axes, axis=dim, tiled=True)
            there = jax.lax.dynamic_index_in_dim(stack, slot % p)
            held = (slot // p == rank) & (slot_to_expert_P[slot] >= 0)
            return _write(stack, jnp.where(held, expert, there), slot % p)

        shape = [p, *experts.shape[1:]]
        if dim:
            shape[dim] *= n
        return jax.lax.fori_loop(np.int32(0), np.int32(len(slot_to_expert_P)), one, jnp.zeros(shape, experts.dtype))

    physical = jax.shard_map(
        local, mesh=over.mesh, in_specs=(over.logical, PartitionSpec()), out_specs=over.physical, check_vma=False
    )(experts, slot_to_expert_P)
    return jax.lax.bitcast_convert_type(physical, dtype)


def _for_collectives(stack: jax.Array) -> jax.Array:
    """A stack that every kind of GPU adds and gathers: bytes in place of floats of 8 bits, others as they are."""
    of_a_byte = stack.dtype.itemsize == 1 and jnp.issubdtype(stack.dtype, jnp.floating)
    return jax.lax.bitcast_convert_type(stack, jnp.uint8) if of_a_byte else stack


def _write(stack: jax.Array, expert: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, expert, place, 0)
