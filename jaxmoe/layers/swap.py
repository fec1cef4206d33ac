"""Giving a running MoE layer another placement: experts move between slots on the devices, nothing is read from disk.

One stack of weights is done after the other. Every slot that is to change is first copied to its new
device, and only then written, because its old contents may be the source of another. They are written into a copy of
the stack: another module may hold the old one, as `nnx.clone` leaves it. So a device needs room for its part of one
stack once more, for as many slots of it as the device receives, and for one slot besides.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.checks import integer
from jaxmoe.layers.in_place import update_slice
from jaxmoe.layers.moe import MoE
from jaxmoe.layers.moments import Moment, expert_moments
from jaxmoe.layers.usable import check_usable
from jaxmoe.placement import ExpertPlacement, make_placements
from jaxmoe.placement.migration import OTHER_NODE, SAME_DEVICE, SAME_NODE, Move, plan_migration


@dataclasses.dataclass
class MovedBytes:
    """Bytes of experts that were copied, by the way they took; copies of the experts along dp count each.

    They are those of weights, and of what an optimizer has for each weight where it was given.

    Attributes:
        same_device: bytes between slots of one device.
        same_node: bytes between devices of one node.
        other_node: bytes between nodes.
    """

    same_device: int = 0
    same_node: int = 0
    other_node: int = 0

    @property
    def total(self) -> int:
        """Bytes of all three."""
        return self.same_device + self.same_node + self.other_node

    def __add__(self, other: "MovedBytes") -> "MovedBytes":
        return MovedBytes(
            self.same_device + other.same_device, self.same_node + other.same_node, self.other_node + other.other_node
        )

    def add(self, distance: int, count: int) -> None:
        """Count bytes of a `Move` of that distance."""
        name = {SAME_DEVICE: "same_device", SAME_NODE: "same_node", OTHER_NODE: "other_node"}[distance]
        setattr(self, name, getattr(self, name) + count)


def check_swap(moe: MoE, placement: ExpertPlacement) -> None:
    """Refuse a placement that the layer's slots cannot take.

    Raises:
        ValueError: it is for other experts, devices or slots.
        NotImplementedError: the layer's devices belong to several processes.
    """
    now = moe.placement
    if (placement.num_experts, placement.ep, placement.num_slots) != (now.num_experts, now.ep, now.num_slots):
        raise ValueError(
            f"a running layer keeps its {now.num_slots} slots for {now.num_experts} experts on {now.ep} devices; the "
            f"placement is for {placement.num_slots} slots, {placement.num_experts} experts and {placement.ep} "
            f"devices: make one with num_slots={now.num_slots}, or bring the model there with jaxmoe.move"
        )
    if moe.mesh.is_multi_process:
        raise NotImplementedError(
            "experts are swapped between the devices of one process, and this mesh spans several; "
            "load the checkpoint with the new placement instead"
        )


def swap_experts(
    moe: MoE,
    placement: ExpertPlacement,
    *,
    num_nodes: int = 1,
    moments: Sequence[Moment] = (),
) -> MovedBytes:
    """Bring the layer from its placement to another one; see the module's description.

    Each slot that changes is copied from the nearest slot that holds its expert. Programs compiled for the layer
    stay valid: no shape changes.

    Args:
        moe: layer whose stacks are replaced one after the other; the old ones stay as they are for who holds them.
        placement: new placement, of as many slots on as many devices.
        num_nodes: number of nodes of equally many devices along the layer's `expert_axes`.
        moments: arrays of an optimizer for the layer's stacks, see `expert_moments`; their slots go the same ways.

    Raises:
        ValueError, NotImplementedError: see `check_swap`.
        RuntimeError: the layer's arrays were donated or deleted.
        Exception: what JAX raises where a device has no room for the slots on their way; the layer is as it was then.
    """
    check_usable(moe)
    check_swap(moe, placement)
    # Ctrl-C is raised in the main thread, and the other one finishes the layer first: stacks that lie by different
    # placements would compute something else without a word.
    with ThreadPoolExecutor(max_workers=1) as worker:
        return worker.submit(_swap_stacks, moe, placement, num_nodes, moments).result()


def rebalance_layers(
    module: nnx.Module,
    layers: Sequence[MoE],
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
    *,
    num_nodes: int = 1,
    optimizer: Any = None,
) -> MovedBytes:
    """Swap the experts of a module's layers, one layer after another; where one cannot be, none is.

    Args:
        module: module that the optimizer was made for.
        layers: MoE layers in it.
        placement: placement of all of them, or one for each.
        num_nodes: number of nodes, as for `swap_experts`.
        optimizer: optimizer as for `expert_moments`; None for none.

    Raises:
        ValueError: a placement does not fit, there is no layer, or the optimizer cannot go along.
        NotImplementedError: the mesh spans several processes.
    """
    check_usable(module)
    num_nodes = integer("num_nodes", num_nodes, least=1)
    if not layers:
        raise ValueError(f"no layer of this {type(module).__name__} has routed experts: there is nothing to place")
    placements = make_placements(placement, [moe.config.num_experts for moe in layers], layers[0].placement.ep)
    for moe, wanted in zip(layers, placements, strict=True):
        check_swap(moe, wanted)
    moments: list[Any] = [()] * len(layers) if optimizer is None else expert_moments(module, layers, optimizer)
    moved = MovedBytes()
    for moe, wanted, beside in zip(layers, placements, moments, strict=True):
        moved += swap_experts(moe, wanted, num_nodes=num_nodes, moments=beside)
    return moved


def _swap_stacks(
    moe: MoE,
    placement: ExpertPlacement,
    num_nodes: int,
    moments: Sequence[Moment],
) -> MovedBytes:
    moves = plan_migration(moe.placement, placement, num_nodes=num_nodes).moves
    moved, swapped = MovedBytes(), []
    try:
        for moment, stack in moments:
            # A state that was made under jit lies on one device; from now on it lies as its weights do.
            moment.set_value(jax.device_put(moment.get_value(), stack.get_value().sharding))
        for stack in (*moe.expert_stacks(), *moe.expert_factors(), *[moment for moment, _ in moments]):
            stack.set_value(_swap(stack.get_value(), moves, moe, moved))
            swapped.append(stack)
    except BaseException:
        back = plan_migration(placement, moe.placement, num_nodes=num_nodes).moves
        for stack in swapped:
            stack.set_value(_swap(stack.get_value(), back, moe, MovedBytes()))
        raise
    moe.set_placement(placement)
    return moved


def _swap(stack: jax.Array, moves: Sequence[Move], moe: MoE, moved: MovedBytes) -> jax.Array:
    p, ranks = moe.placement.slots_per_device, _expert_ranks(moe.mesh, moe.expert_axis_names)
    over = stack.sharding, P(moe.expert_axis_names)
    # Per destination rank: its new slots, and their weights on each device of that rank.
    places: dict[int, list[int]] = defaultdict(list)
    pieces: dict[jax.Device, list[jax.Array]] = defaultdict(list)
    taken = None
    for group in _one_per_source(moves, p):
        taken = _take(stack, _per_rank({move.source // p: move.source % p for move in group}, moe), over=over)
        on_device = {shard.device: shard.data for shard in taken.addressable_shards}
        for move in group:
            source, destination = move.source // p, move.slot // p
            places[destination].append(move.slot % p)
            for devices in ranks:
                piece = jax.device_put(on_device[devices[source]], devices[destination])
                pieces[devices[destination]].append(piece)
                moved.add(move.distance, piece.nbytes)
        # What was taken for devices that sent nothing is dropped before the next group is taken.
        jax.block_until_ready(list(pieces.values()))
    if taken is None:
        return stack
    idle = {shard.device: shard.data for shard in taken.addressable_shards}
    stack = _copy(stack)
    for turn in range(max(map(len, places.values()))):
        arriving = [pieces[device][turn] if turn < len(pieces[device]) else idle[device] for device in idle]
        piece = jax.make_array_from_single_device_arrays(taken.shape, taken.sharding, arriving)
        stack = _put(stack, piece, _turn(places, turn, moe), over=over)
    return stack


def fill_slots(stack: jax.Array, experts: jax.Array, places: Sequence[Sequence[int]], moe: MoE) -> jax.Array:
    """Write experts that are on their devices already into slots of a stack, in its own memory.

    Args:
        stack: [P, ...], one of the layer's `expert_stacks`; it is used up.
        experts: [n·m, ...], m experts for each of n devices, sharded like the stack.
        places: slots (0..p-1) of each device that its experts go to, at most m; the rest is padding.
        moe: layer of the stack.
    """
    over = stack.sharding, P(moe.expert_axis_names)
    for turn in range(max(map(len, places))):
        piece = _take(experts, _per_rank(dict.fromkeys(range(len(places)), turn), moe), over=over)
        stack = _put(stack, piece, _turn(dict(enumerate(places)), turn, moe), over=over)
    return stack


def by_rank(slots: Iterable[int], placement: ExpertPlacement) -> list[list[int]]:
    """Sort slots of a placement by device, as places (0..p-1) on each."""
    places: list[list[int]] = [[] for _ in range(placement.ep)]
    for slot in slots:
        places[slot // placement.slots_per_device].append(slot % placement.slots_per_device)
    return places


def _turn(places: Mapping[int, Sequence[int]], turn: int, moe: MoE) -> jax.Array:
    """The place that each rank fills in this turn, -1 for those that have no more."""
    return _per_rank({rank: slots[turn] for rank, slots in places.items() if turn < len(slots)}, moe)


def _one_per_source(moves: Iterable[Move], p: int) -> list[list[Move]]:
    """The moves in groups in which every device sends one slot at most."""
    groups: list[list[Move]] = []
    sent: dict[int, int] = defaultdict(int)
    for move in moves:
        turn = sent[move.source // p]
        sent[move.source // p] += 1
        if turn == len(groups):
            groups.append([])
        groups[turn].append(move)
    return groups


def _expert_ranks(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """Devices [groups, ranks along `axes`]; the devices of a group differ in nothing but that rank."""
    others = [axis for axis in mesh.axis_names if axis not in axes]
    order = [mesh.axis_names.index(axis) for axis in (*others, *axes)]
    ranks = int(np.prod([mesh.shape[axis] for axis in axes]))
    return mesh.devices.transpose(order).reshape(-1, ranks)


def _per_rank(values: dict[int, int], moe: MoE) -> jax.Array:
    """int32 [ranks], one number for each device along the expert axes, -1 where `values` has none."""
    numbers = np.full(moe.placement.ep, -1, np.int32)
    numbers[list(values)] = list(values.values())
    return jax.device_put(numbers, NamedSharding(moe.mesh, P(moe.expert_axis_names)))


@partial(jax.jit, static_argnames="over")
def _take(stack: jax.Array, place_n: jax.Array, *, over: tuple[NamedSharding, P]) -> jax.Array:
    """One slot of each device, as an array with a slot a device; any slot where the place is -1."""
    sharding, per_rank = over

    def local(stack: jax.Array, place: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(stack, jnp.maximum(place[0], 0), keepdims=True)

    specs = (sharding.spec, per_rank)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(stack, place_n)


@jax.jit
def _copy(stack: jax.Array) -> jax.Array:
    return jnp.copy(stack)


@partial(jax.jit, static_argnames="over", donate_argnums=0)
def _put(stack: jax.Array, piece: jax.Array, place_n: jax.Array, *, over: tuple[NamedSharding, P]) -> jax.Array:
    """The stack with each device's piece in its place, in the stack's own memory; nothing where the place is -1."""
    sharding, per_rank = over

    def local(stack: jax.Array, piece: jax.Array, place: jax.Array) -> jax.Array:
        index = jnp.maximum(place[0], 0)
        there = jax.lax.dynamic_index_in_dim(stack, index, keepdims=True)
        return update_slice(stack, jnp.where(place[0] < 0, there, piece), (index, *(0,) * (stack.ndim - 1)))

    specs = (sharding.spec, sharding.spec, per_rank)
    return jax.shard_map(local, mesh=sharding.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(
        stack, piece, place_n
    )
