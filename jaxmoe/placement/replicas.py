"""Replica choice: which slot a token goes to where its expert has several.

A choice is one function and a line in `REPLICA_CHOICES`. What each costs is judged by running a
trace through it; the best that any choice could do is `optimal_max_load`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmoe.placement.base import ExpertPlacement


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaContext:
    """What a replica choice may look at besides the placement.

    Attributes:
        home: int [T], the device each token lives on.
        turn: int [T], the number of each token among those of its device.
        devices_per_node: devices of a node, numbered one node after the other.
        last_load: float [ep], rows that each device received in the window before; zeros in the first.
        seed: of random choices.
    """

    home: np.ndarray
    turn: np.ndarray
    devices_per_node: int
    last_load: np.ndarray
    seed: int = 0


def modulo(ids_TK: np.ndarray, placement: ExpertPlacement, context: ReplicaContext) -> np.ndarray:
    """Tokens take turns: a device's t-th token goes to replica t mod (replicas of its expert)."""
    return _pick(ids_TK, placement, context.turn[:, None])


def local_first(ids_TK: np.ndarray, placement: ExpertPlacement, context: ReplicaContext) -> np.ndarray:
    """A replica on the token's own device, else one on its node, else any; tokens take turns over equally near ones."""
    slots_TKX = placement.expert_to_slots[np.maximum(ids_TK, 0)]
    device_TKX, home_T11 = slots_TKX // placement.slots_per_device, context.home[:, None, None]
    n = context.devices_per_node
    distance_TKX = np.where(device_TKX == home_T11, 0, np.where(device_TKX // n == home_T11 // n, 1, 2))
    distance_TKX[slots_TKX < 0] = 3
    near_TKX = distance_TKX == distance_TKX.min(axis=2, keepdims=True)
    turn_TK = context.turn[:, None] % near_TKX.sum(axis=2)
    chosen_TKX = near_TKX & (np.cumsum(near_TKX, axis=2) == turn_TK[:, :, None] + 1)
    slots_TK = np.take_along_axis(slots_TKX, chosen_TKX.argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    return np.where(ids_TK < 0, -1, slots_TK)


def seeded_random(ids_TK: np.ndarray, placement: ExpertPlacement, context: ReplicaContext) -> np.ndarray:
    """Any replica with equal chance; equal seeds give equal choices."""
    turns_TK = np.random.default_rng(context.seed).integers(0, np.iinfo(np.int32).max, size=ids_TK.shape)
    return _pick(ids_TK, placement, turns_TK)


def least_loaded(ids_TK: np.ndarray, placement: ExpertPlacement, context: ReplicaContext) -> np.ndarray:
    """The replica on the device that received fewest rows in the window before.

    All tokens of a window follow the same figures, so the device that was idle is flooded next:
    where loads are steady, taking turns does better.
    """
    slots_EX = placement.expert_to_slots
    load_EX = np.where(slots_EX < 0, np.inf, context.last_load[slots_EX // placement.slots_per_device])
    return _pick(ids_TK, placement, load_EX.argmin(axis=1)[np.maximum(ids_TK, 0)])


ReplicaChoice = Callable[[np.ndarray, ExpertPlacement, ReplicaContext], np.ndarray]
"""``(ids_TK, placement, context) -> slots_TK``; an id of -1 gives a slot of -1."""

REPLICA_CHOICES: dict[str, ReplicaChoice] = {
    "modulo": modulo,
    "local_first": local_first,
    "random": seeded_random,
    "least_loaded": least_loaded,
}


def get_replica_choice(name: str) -> ReplicaChoice:
    """The replica choice of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in REPLICA_CHOICES:
        raise ValueError(f"replica choices are {', '.join(sorted(REPLICA_CHOICES))}; got {name!r}")
    return REPLICA_CHOICES[name]


def _pick(ids_TK: np.ndarray, placement: ExpertPlacement, turns_TK: np.ndarray) -> np.ndarray:
    safe_TK = np.maximum(ids_TK, 0)
    slots_TK = placement.expert_to_slots[safe_TK, turns_TK % placement.replica_counts[safe_TK]]
    return np.where(ids_TK < 0, -1, slots_TK)
