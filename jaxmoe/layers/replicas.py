"""The choice among an expert's replicas, inside the compiled program.

The tables come from `jaxmoe.placement.replicas`. They are arrays that the program reads, so a placement or the loads
of the last window can change without a recompilation.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.placement import ExpertPlacement
from jaxmoe.placement.nodes import check_nodes
from jaxmoe.placement.replicas import get_replica_choice


class PlacementTables(NamedTuple):
    """A layer's placement and replica choice as arrays; R is the most replicas that an expert can have.

    Also holds the variables that have them, or their partition specs. The layer's variables have these names.

    Attributes:
        slot_to_expert: int32 [P], the placement itself.
        expert_to_slots: int32 [E, R], slots that any device's tokens may use.
        replica_counts: int32 [E], number of those slots.
        near_slots: int32 [n, E, R], slots that the tokens of each of the n devices use; with "local_first" only.
        near_counts: int32 [n, E], number of those slots.
        last_load: float32 [n], loads by which the tables were made; with "least_loaded" only.
    """

    slot_to_expert: Any
    expert_to_slots: Any
    replica_counts: Any
    near_slots: Any = None
    near_counts: Any = None
    last_load: Any = None


@dataclasses.dataclass(frozen=True, eq=False)
class ReplicaRule:
    """A replica choice and what it looks at.

    Attributes:
        choice: name in `jaxmoe.placement.replicas.REPLICA_CHOICES`.
        devices_per_node: devices of a node, for "local_first"; None for all devices on one node.
        last_load: [n], rows that each device received lately, for "least_loaded".
    """

    choice: str = "modulo"
    devices_per_node: int | None = None
    last_load: np.ndarray | None = None

    def tables(self, placement: ExpertPlacement) -> tuple[np.ndarray, np.ndarray]:
        """Make the slots int32 [n, E, R] that each device's tokens may use for each expert, and their counts int32 [n, E].

        R is the most replicas that any placement with as many slots can have: the tables of all have one shape.

        Raises:
            ValueError: the choice is unknown or lacks loads, or the devices do not split into such nodes.
        """
        n = placement.ep
        node = n if self.devices_per_node is None else self.devices_per_node
        check_nodes(n, node, name="devices_per_node")
        last_load = np.zeros(n) if self.last_load is None else np.asarray(self.last_load, np.float64)
        if last_load.shape != (n,) or (self.last_load is None and self.choice == "least_loaded"):
            raise ValueError(
                f'"least_loaded" follows the loads of {n} devices in the last window; got '
                f"{'none' if self.last_load is None else f'shape {last_load.shape}'}"
            )
        slots, counts = get_replica_choice(self.choice).table(placement, node, last_load)
        widest = placement.num_slots - placement.num_experts + 1
        return np.pad(slots, ((0, 0), (0, 0), (0, widest - slots.shape[2])), constant_values=-1), counts


def choose_replicas(
    x_TD: jax.Array,
    ids_TK: jax.Array,
    tables: PlacementTables,
    *,
    choice: str,
    first_token: int | jax.Array,
    own_tokens: bool,
) -> jax.Array:
    """Choose the physical slot of every choice of a device's tokens, int32 [T, K].

    Args:
        x_TD: activations of the tokens, of which "random" makes its draws.
        ids_TK: logical experts.
        tables: tables of the layer, this device's part.
        choice: name of the rule, as `ReplicaRule` has it.
        first_token: number of the device's first token over all devices.
        own_tokens: True where each device that shares the experts has tokens of its own.
    """
    turn_TK = None
    if tables.expert_to_slots.shape[1] > 1:
        turn_TK = token_draws(x_TD, ids_TK.shape[1]) if choice == "random" else token_turns(ids_TK.shape, first_token)
    slots_TK = choose_slots(ids_TK, tables.expert_to_slots, tables.replica_counts, turn_TK)
    # Where all devices have the same tokens, all must choose alike and none is nearer.
    if tables.near_slots is not None and own_tokens:
        near_TK = choose_slots(ids_TK, tables.near_slots[0], tables.near_counts[0], turn_TK)
        # A state of a layer without these tables may have brought another placement than they were made for.
        slots_TK = jnp.where(tables.slot_to_expert[near_TK] == ids_TK, near_TK, slots_TK)
    return slots_TK


def choose_slots(ids_TK: jax.Array, slots_ER: jax.Array, counts_E: jax.Array, turn_TK: jax.Array | None) -> jax.Array:
    """Choose the physical slot of every chosen expert: replica number turn mod replicas.

    Args:
        ids_TK: logical experts.
        slots_ER: slots that may be used for each.
        counts_E: number of those slots.
        turn_TK: numbers from `token_turns` or `token_draws`; None where R is 1.
    """
    if turn_TK is None:
        return slots_ER[ids_TK, 0]
    return slots_ER[ids_TK, turn_TK % counts_E[ids_TK]]


def token_turns(shape: tuple[int, ...], first_token: int | jax.Array) -> jax.Array:
    """Number the tokens over all devices, int32 [T, K]: so they take turns over the replicas."""
    return jnp.broadcast_to((first_token + jnp.arange(shape[0], dtype=jnp.int32))[:, None], shape)


def token_draws(x_TD: jax.Array, K: int) -> jax.Array:
    """Draw a non-negative int32 for every choice, [T, K]: a hash of the token's activations.

    Equal tokens draw alike, so that a run can be repeated, wherever they stand in a batch. The mixing steps are those
    of a 32-bit integer hash with low bias (constants by C. Wellons, "Prospecting for Hash Functions", 2018).
    """
    bits_TD = jax.lax.bitcast_convert_type(x_TD.astype(jnp.float32), jnp.uint32)
    # Another odd factor for each place, so that the order of the numbers counts.
    factors_D = jnp.arange(x_TD.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B2) + jnp.uint32(0x85EBCA6B)
    salt_K = jnp.arange(K, dtype=jnp.uint32) * jnp.uint32(0xC2B2AE35)
    hash_TK = jnp.sum(bits_TD * factors_D[None], axis=1, dtype=jnp.uint32)[:, None] + salt_K[None]
    hash_TK = (hash_TK ^ (hash_TK >> 16)) * jnp.uint32(0x7FEB352D)
    hash_TK = (hash_TK ^ (hash_TK >> 15)) * jnp.uint32(0x846CA68B)
    return ((hash_TK ^ (hash_TK >> 16)) >> 1).astype(jnp.int32)
