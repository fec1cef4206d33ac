"""Queues of rows for each destination, and the part of them that each round of an exchange sends.

Each (token, destination) pair is one row, however many of the token's experts live at that destination. A device's rows
for a destination stand in a queue; round i takes the places i·C up to (i + 1)·C of every queue. Letters here, beside the
common ones of docs/concepts/letters.md: J the most destinations that a token can have, C rows of a round for each
destination, L places of a queue.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.dispatch.base import DispatchLayout
from jaxmoe.dispatch.collectives import reached


def capacity(T: int, K: int, layout: DispatchLayout) -> int:
    """C, the rows one device sends to one other in a round, from shapes alone.

    T tokens have T·q rows for a device with even routing (see `collectives.reached`) and at most T with any.
    """
    buffers, q = layout.buffers, reached(K, layout.num_slots, layout.slots_per_device)
    wanted = buffers.row_headroom * T * q + buffers.row_deviations * math.sqrt(T * q * (1 - q))
    return min(T, max(buffers.min_rows, -(-math.ceil(wanted) // 8) * 8))


class SendQueues(NamedTuple):
    """The queues of one device.

    Attributes:
        destinations: int32 [T, J], the distinct destinations of each token; -1 where it has fewer than J.
        places: int32 [T, J], each token's place in the queue for that destination.
        tokens: int32 [n, a multiple of C], the tokens in the queue for each destination; 0 beyond its end.
        lengths_n: int32 [n], the length of each queue.
    """

    destinations: jax.Array
    places: jax.Array
    tokens: jax.Array
    lengths_n: jax.Array


def fill_queues(slots_TK: jax.Array, num_devices: int, slots_per_device: int, C: int) -> SendQueues:
    """Put every token once in the queue for each device that holds one of its slots; slots of -1 go nowhere."""
    T, K = slots_TK.shape
    n = num_devices
    chosen_TK = jnp.where(slots_TK >= 0, slots_TK // slots_per_device, -1)
    device_n = jnp.arange(n, dtype=jnp.int32)
    goes_Tn = jnp.any(chosen_TK[:, :, None] == device_n[None, None], axis=1)
    ahead_Tn = jnp.cumsum(goes_Tn, axis=0, dtype=jnp.int32) - goes_Tn.astype(jnp.int32)
    if n < K:
        dest_TJ = jnp.where(goes_Tn, device_n[None], -1)
        place_TJ = ahead_Tn
    else:
        same_TKK = chosen_TK[:, :, None] == chosen_TK[:, None, :]
        seen_TK = jnp.any(same_TKK & jnp.tri(K, k=-1, dtype=bool)[None], axis=2)
        dest_TJ = jnp.where(seen_TK, -1, chosen_TK)
        place_TJ = jnp.take_along_axis(ahead_Tn, jnp.maximum(dest_TJ, 0), axis=1)
    tokens_TJ = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], dest_TJ.shape)
    queues_nL = jnp.zeros((n, -(-T // C) * C), jnp.int32)
    # An index of n is out of bounds, and what goes there is dropped.
    queues_nL = queues_nL.at[jnp.where(dest_TJ >= 0, dest_TJ, n), place_TJ].set(tokens_TJ, mode="drop")
    return SendQueues(dest_TJ, place_TJ, queues_nL, jnp.sum(goes_Tn, axis=0, dtype=jnp.int32))


class Round(NamedTuple):
    """Rows that one round sends, and places where its answers stand.

    Attributes:
        tokens: int32 [n, C], the token in each place of the send buffer.
        sizes_n: int32 [n], places used for each destination; they are the first ones.
        places: int32 [T, J], where in [n·C] the answer of each destination comes back; -1 if not in this round.
    """

    tokens: jax.Array
    sizes_n: jax.Array
    places: jax.Array


def take_round(queues: SendQueues, index: jax.Array, C: int) -> Round:
    """Rows and places of round `index`."""
    tokens_nC = jax.lax.dynamic_slice_in_dim(queues.tokens, index * C, C, axis=1)
    sizes_n = jnp.clip(queues.lengths_n - index * C, 0, C)
    now_TJ = (queues.destinations >= 0) & (queues.places // C == index)
    places_TJ = jnp.where(now_TJ, queues.destinations * C + queues.places % C, -1)
    return Round(tokens_nC, sizes_n, places_TJ)


def slots_at(slots_TK: jax.Array, device: jax.Array, slots_per_device: int) -> jax.Array:
    """Local slots of the choices that live on `device`, -1 for the others; `device` broadcasts against the slots."""
    here = (slots_TK >= 0) & (slots_TK // slots_per_device == device)
    return jnp.where(here, slots_TK % slots_per_device, -1)
