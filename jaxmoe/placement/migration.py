"""Going from one placement to another: which slots change, and where each gets its weights from."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxmoe.placement.base import ExpertPlacement
from jaxmoe.placement.nodes import check_nodes

SAME_DEVICE, SAME_NODE, OTHER_NODE = 0, 1, 2


class Move(NamedTuple):
    """One slot to fill.

    Attributes:
        slot: the physical slot that gets the expert.
        expert: the logical expert.
        source: the slot that holds it now.
        distance: 0 on the same device, 1 on the same node, 2 on another node.
    """

    slot: int
    expert: int
    source: int
    distance: int


@dataclasses.dataclass(frozen=True)
class Migration:
    """The moves that turn one layer's placement into another.

    All sources are slots of the placement before: a move may overwrite the source of a later one,
    so whoever carries them out reads first or orders them.

    Attributes:
        moves: moves of all slots that are to hold another expert than now; a slot that becomes padding needs none.
    """

    moves: tuple[Move, ...]

    def bytes(self, expert_bytes: int) -> dict[str, int]:
        """Bytes to copy, by the way they take: "same_device", "same_node", "other_node"."""
        distances = [move.distance for move in self.moves]
        names = {"same_device": SAME_DEVICE, "same_node": SAME_NODE, "other_node": OTHER_NODE}
        return {name: distances.count(distance) * expert_bytes for name, distance in names.items()}


def plan_migration(before: ExpertPlacement, after: ExpertPlacement, *, num_nodes: int = 1) -> Migration:
    """Find the cheapest source for every slot that changes.

    A slot that keeps its expert costs nothing. Otherwise it copies from a slot on its own device,
    else from one on its node, else from any; among equals from the device that has the fewest
    copies to send so far.

    Args:
        before: placement that the devices hold.
        after: placement that they are to hold, on as many devices; the number of slots may differ, and slots are then
            matched by their place on the device.
        num_nodes: nodes of ep / num_nodes devices.

    Returns:
        The moves, in rising order of slots.

    Raises:
        ValueError: the placements are for other numbers of experts or devices.

    Example:
        >>> before = ExpertPlacement.linear(num_experts=4, ep=2)
        >>> plan_migration(before, ExpertPlacement(num_experts=4, ep=2, slot_to_expert=[0, 2, 1, 3])).moves
        (Move(slot=1, expert=2, source=2, distance=1), Move(slot=2, expert=1, source=1, distance=1))
    """
    if (before.num_experts, before.ep) != (after.num_experts, after.ep):
        raise ValueError(
            f"experts move between placements of the same experts on the same devices: got {before.num_experts} on "
            f"{before.ep} and {after.num_experts} on {after.ep}"
        )
    devices_per_node = check_nodes(before.ep, num_nodes)
    sending = np.zeros(before.ep, np.int64)
    moves = []
    for slot in np.flatnonzero(after.slot_to_expert >= 0):
        device, place = divmod(int(slot), after.slots_per_device)
        expert = int(after.slot_to_expert[slot])
        if (
            place < before.slots_per_device
            and before.slot_to_expert[device * before.slots_per_device + place] == expert
        ):
            continue
        sources = before.expert_to_slots[expert, : before.replica_counts[expert]]
        holders = sources // before.slots_per_device
        distances = np.where(
            holders == device,
            SAME_DEVICE,
            np.where(holders // devices_per_node == device // devices_per_node, SAME_NODE, OTHER_NODE),
        )
        best = np.lexsort((sending[holders], distances))[0]
        if distances[best] != SAME_DEVICE:
            sending[holders[best]] += 1
        moves.append(Move(int(slot), expert, int(sources[best]), int(distances[best])))
    return Migration(tuple(moves))


def migration_bytes(
    before: Sequence[ExpertPlacement], after: Sequence[ExpertPlacement], expert_bytes: int, *, num_nodes: int = 1
) -> dict[str, int]:
    """Bytes to copy over all layers, by the way they take."""
    total = {"same_device": 0, "same_node": 0, "other_node": 0}
    for old, new in zip(before, after, strict=True):
        for name, count in plan_migration(old, new, num_nodes=num_nodes).bytes(expert_bytes).items():
            total[name] += count
    return total


def align(before: ExpertPlacement, after: ExpertPlacement, *, num_nodes: int = 1) -> ExpertPlacement:
    """`after` with devices and slots renumbered so that fewer experts move.

    Devices that are alike may trade their whole contents: each set of experts that `after` puts on a node goes to the
    device of that node which holds most of it already. Within a device, experts that stay keep their slots. Loads,
    destinations per token and traffic between nodes stay as they are. Pass the result on only where the devices of
    a node are equal in speed and memory.

    Args:
        before: placement that the devices hold.
        after: placement that they are to hold, with as many slots.
        num_nodes: nodes of ep / num_nodes devices.

    Raises:
        ValueError: the placements differ in experts, devices or slots.

    Example:
        >>> before = ExpertPlacement.linear(num_experts=4, ep=2)
        >>> align(before, ExpertPlacement(num_experts=4, ep=2, slot_to_expert=[3, 2, 0, 1])) == before
        True
    """
    if (before.num_experts, before.ep, before.num_slots) != (after.num_experts, after.ep, after.num_slots):
        raise ValueError(
            f"align needs placements of the same experts, devices and slots: got "
            f"{(before.num_experts, before.ep, before.num_slots)} and {(after.num_experts, after.ep, after.num_slots)}"
        )
    devices_per_node = check_nodes(before.ep, num_nodes)
    held, wanted = before.device_replicas, after.device_replicas
    stays_nn = np.minimum(wanted[:, None], held).sum(axis=2)
    node_n = np.arange(before.ep) // devices_per_node
    stays_nn[node_n[:, None] != node_n] = -1
    old_slots, new_slots = before.slot_to_expert.reshape(before.ep, -1), after.slot_to_expert.reshape(after.ep, -1)
    slots = np.empty_like(old_slots)
    # Largest overlap first; a pair that is used up, or on different nodes, is -1.
    while stays_nn.max() >= 0:
        contents, device = divmod(int(stays_nn.argmax()), before.ep)
        slots[device] = _keep_places(old_slots[device], new_slots[contents])
        stays_nn[contents], stays_nn[:, device] = -1, -1
    return ExpertPlacement(after.num_experts, after.ep, slots.reshape(-1))


def _keep_places(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """The experts of `new`, those that `old` has too in their old places."""
    result, waiting = np.full_like(old, -2), list(new)
    for place, expert in enumerate(old):
        if expert in waiting:
            result[place] = expert
            waiting.remove(expert)
    result[result == -2] = waiting
    return result
