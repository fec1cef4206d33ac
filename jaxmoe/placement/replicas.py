"""Replica choice: the choice of a token's slot where its expert has several.

A choice is a table of the slots that each device may use for each expert, and whether tokens take turns over
them or draw; a line in `REPLICA_CHOICES`. A running model reads the same tables (`jaxmoe.MoE.choose_replicas`).
What each choice costs is judged by running a trace through it; the best that any could do is `optimal_split`.

Letters here, beside the common ones of docs/concepts/letters.md: X the most replicas of an expert.
"""

import dataclasses
from typing import NamedTuple, Protocol

import numpy as np

from jaxmoe.placement.base import ExpertPlacement


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaContext:
    """Facts that a replica choice may look at besides the placement.

    Attributes:
        home: int [T], the device each token lives on.
        turn: int [T], the number of each token among those of its device.
        devices_per_node: devices of a node, numbered one node after the other.
        last_load: float [ep], rows that each device received in the window before; zeros in the first.
        seed: seed of random choices.
    """

    home: np.ndarray
    turn: np.ndarray
    devices_per_node: int
    last_load: np.ndarray
    seed: int = 0


class ReplicaTable(NamedTuple):
    """The slots that the tokens of each device may use.

    Attributes:
        slots: int32 [n, E, X], for device and expert, padded with -1.
        counts: int32 [n, E], number of those that are no padding, at least 1; they come first.
    """

    slots: np.ndarray
    counts: np.ndarray


class MakeTable(Protocol):
    """Make the table of a placement; the body of a replica choice. A slot holds the expert that it is listed for."""

    def __call__(self, placement: ExpertPlacement, devices_per_node: int, last_load: np.ndarray, /) -> ReplicaTable:
        """Make the table.

        Args:
            placement: placement of one layer.
            devices_per_node: devices of a node, a divisor of the placement's.
            last_load: float [ep], rows that each device received in the window before.
        """


def any_replica(placement: ExpertPlacement, devices_per_node: int, last_load: np.ndarray) -> ReplicaTable:
    """All slots of an expert, for every device."""
    del devices_per_node, last_load
    n = placement.ep
    return ReplicaTable(
        np.broadcast_to(placement.expert_to_slots, (n, *placement.expert_to_slots.shape)),
        np.broadcast_to(placement.replica_counts, (n, placement.num_experts)),
    )


def nearest_replicas(placement: ExpertPlacement, devices_per_node: int, last_load: np.ndarray) -> ReplicaTable:
    """The slots on the token's own device, else those on its node, else all."""
    del last_load
    slots_EX, n = placement.expert_to_slots, placement.ep
    device_EX, home_n11 = slots_EX // placement.slots_per_device, np.arange(n)[:, None, None]
    same_node_nEX = device_EX // devices_per_node == home_n11 // devices_per_node
    distance_nEX = np.where(device_EX == home_n11, 0, np.where(same_node_nEX, 1, 2))
    distance_nEX[:, slots_EX < 0] = 3
    near_nEX = distance_nEX == distance_nEX.min(axis=2, keepdims=True)
    # The near ones to the front, in their order.
    order_nEX = np.argsort(~near_nEX, axis=2, kind="stable")
    slots_nEX = np.take_along_axis(np.where(near_nEX, slots_EX, -1), order_nEX, axis=2)
    return ReplicaTable(slots_nEX, near_nEX.sum(axis=2).astype(np.int32))


def idlest_replica(placement: ExpertPlacement, devices_per_node: int, last_load: np.ndarray) -> ReplicaTable:
    """The one slot on the device that received fewest rows in the window before."""
    del devices_per_node
    slots_EX, n = placement.expert_to_slots, placement.ep
    load_EX = np.where(slots_EX < 0, np.inf, last_load[slots_EX // placement.slots_per_device])
    slots_E1 = np.take_along_axis(slots_EX, load_EX.argmin(axis=1)[:, None], axis=1)
    slots_EX = np.pad(slots_E1, ((0, 0), (0, slots_EX.shape[1] - 1)), constant_values=-1)
    return ReplicaTable(np.broadcast_to(slots_EX, (n, *slots_EX.shape)), np.ones((n, placement.num_experts), np.int32))


@dataclasses.dataclass(frozen=True)
class ReplicaChoice:
    """A way to choose among the slots of an expert: an entry of `REPLICA_CHOICES`.

    Attributes:
        table: function from a placement to the slots to choose from.
        random: flag that one of them is drawn; otherwise tokens take turns, those of device d beginning with the d-th.
    """

    table: MakeTable
    random: bool = False

    def __call__(self, ids_TK: np.ndarray, placement: ExpertPlacement, context: ReplicaContext) -> np.ndarray:
        """The slot of each choice, int [T, K]; an id of -1 gives a slot of -1."""
        slots_nEX, counts_nE = self.table(placement, context.devices_per_node, context.last_load)
        home_T1, safe_TK = context.home[:, None], np.maximum(ids_TK, 0)
        if self.random:
            turn_TK = np.random.default_rng(context.seed).integers(0, np.iinfo(np.int32).max, size=ids_TK.shape)
        else:
            turn_TK = np.broadcast_to(home_T1 + context.turn[:, None], ids_TK.shape)
        slots_TK = slots_nEX[home_T1, safe_TK, turn_TK % counts_nE[home_T1, safe_TK]]
        return np.where(ids_TK < 0, -1, slots_TK)


REPLICA_CHOICES: dict[str, ReplicaChoice] = {
    "modulo": ReplicaChoice(any_replica),
    "local_first": ReplicaChoice(nearest_replicas),
    "random": ReplicaChoice(any_replica, random=True),
    # All tokens of a window follow the same figures, so the device that was idle is flooded next: where loads are
    # steady, taking turns does better.
    "least_loaded": ReplicaChoice(idlest_replica),
}


def get_replica_choice(name: str) -> ReplicaChoice:
    """The replica choice of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in REPLICA_CHOICES:
        raise ValueError(f"replica choices are {', '.join(sorted(REPLICA_CHOICES))}; got {name!r}")
    return REPLICA_CHOICES[name]
