"""The index arithmetic of an exchange in bounded rounds: the rows of each destination in each round.

Each (token, destination) pair is one row, however many of the token's experts live at that destination. A device's rows
for a destination stand in a line; round i takes the places i·C up to (i + 1)·C of every line. Letters here, beside the
common ones of docs/concepts/letters.md: J the most destinations that a token can have, C rows of a round for each
destination, L places of a line.
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


class ExchangePlan(NamedTuple):
    """The lines of one device.

    Attributes:
        destinations: int32 [T, J], the distinct destinations of each token; -1 where it has fewer than J.
        ranks: int32 [T, J], each token's place in the line for that destination.
        lines: int32 [n, a multiple of C], the tokens in line for each destination; 0 beyond the end of a line.
        need_n: int32 [n], the length of each line.
    """

    destinations: jax.Array
    ranks: jax.Array
    lines: jax.Array
    need_n: jax.Array


def make_plan(slots_TK: jax.Array, num_devices: int, slots_per_device: int, C: int) -> ExchangePlan:
    """Put every token once in the line for each device that holds one of its slots; slots of -1 go nowhere."""
    T, K = slots_TK.shape
    n = num_devices
    chosen_TK = jnp.where(slots_TK >= 0, slots_TK // slots_per_device, -1)
    device_n = jnp.arange(n, dtype=jnp.int32)
    goes_Tn = jnp.any(chosen_TK[:, :, None] == device_n[None, None], axis=1)
    ahead_Tn = jnp.cumsum(goes_Tn, axis=0, dtype=jnp.int32) - goes_Tn.astype(jnp.int32)
    if n < K:
        dest_TJ = jnp.where(goes_Tn, device_n[None], -1)
        rank_TJ = ahead_Tn
    else:
        same_TKK = chosen_TK[:, :, None] == chosen_TK[:, None, :]
        seen_TK = jnp.any(same_TKK & jnp.tri(K, k=-1, dtype=bool)[None], axis=2)
        dest_TJ = jnp.where(seen_TK, -1, chosen_TK)
        rank_TJ = jnp.take_along_axis(ahead_Tn, jnp.maximum(dest_TJ, 0), axis=1)
    tokens_TJ = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], dest_TJ.shape)
    lines_nL = jnp.zeros((n, -(-T // C) * C), jnp.int32)
    # An index of n is out of bounds, and what goes there is dropped.
    lines_nL = lines_nL.at[jnp.where(dest_TJ >= 0, dest_TJ, n), rank_TJ].set(tokens_TJ, mode="drop")
    return ExchangePlan(dest_TJ, rank_TJ, lines_nL, jnp.sum(goes_Tn, axis=0, dtype=jnp.int32))


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


def plan_round(plan: ExchangePlan, index: jax.Array, C: int) -> Round:
    """The plan of round `index`."""
    tokens_nC = jax.lax.dynamic_slice_in_dim(plan.lines, index * C, C, axis=1)
    sizes_n = jnp.clip(plan.need_n - index * C, 0, C)
    now_TJ = (plan.destinations >= 0) & (plan.ranks // C == index)
    places_TJ = jnp.where(now_TJ, plan.destinations * C + plan.ranks % C, -1)
    return Round(tokens_nC, sizes_n, places_TJ)


def slots_at(slots_TK: jax.Array, device: jax.Array, slots_per_device: int) -> jax.Array:
    """Local slots of the choices that live on `device`, -1 for the others; `device` broadcasts against the slots."""
    here = (slots_TK >= 0) & (slots_TK // slots_per_device == device)
    return jnp.where(here, slots_TK % slots_per_device, -1)
