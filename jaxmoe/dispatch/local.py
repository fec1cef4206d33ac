"""A device's own experts applied to rows that each chose several of them; one sum a row comes back.

Letters here, beside the common ones of docs/concepts/letters.md: N rows times choices, Q pairs of a trip.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.dispatch.base import Buffers, DispatchLayout, Experts
from jaxmoe.dispatch.rounds import Bodies, sum_rounds
from jaxmoe.numerics import sum_dtype

# Up to this many pairs are put in order by comparing each with each, in two small kernels of a GPU, where a sort has more
# that wait for one another. More of them take a CPU longer than a sort.
_MOST_COMPARED = 256


class _Pairs(NamedTuple):
    """(row, choice) pairs of a device, grouped by slot.

    Attributes:
        order: int32 [R·K, then 0 up to a multiple of Q], the pair at each place: first those of slot 0, and so on,
            last those whose expert is not here.
        rows: int32, the row of each of them.
        sizes_p: int32 [p], pairs of each slot.
        places: int32 [R, K], where each pair stands; -1 for those whose expert is not here.
    """

    order: jax.Array
    rows: jax.Array
    sizes_p: jax.Array
    places: jax.Array


def pairs_per_trip(R: int, K: int, expected_pairs: float, buffers: Buffers) -> int:
    """Q, the (row, choice) pairs that are computed at once, from shapes alone."""
    return min(R * K, max(buffers.min_pairs, -(-int(buffers.pair_headroom * expected_pairs) // 8) * 8))


def local_sums(
    x_RD: jax.Array,
    slots_RK: jax.Array,
    weights_RK: jax.Array,
    experts: Experts,
    layout: DispatchLayout,
    *,
    expected_pairs: float,
    weights_on_input: bool,
) -> jax.Array:
    """Σ_k weight_k · expert_{slot_k}(x) over the choices whose slot is in 0..p-1, [R, D] in the sums' dtype.

    At most Q pairs are expanded at once, so that the workspace follows from shapes and not from the routing; a device
    with more of them takes more trips.

    Args:
        x_RD: rows of tokens; one without an expert here is never used.
        slots_RK: int32, local slots; anything outside 0..p-1 is no expert of this device.
        weights_RK: weights of the choices, float32, or float64 as x is.
        experts: experts of this device.
        layout: layout of the experts on the mesh.
        expected_pairs: pairs with an expert here under even routing.
        weights_on_input: flag of `RunDispatch`.
    """
    R, K = slots_RK.shape
    Q = pairs_per_trip(R, K, expected_pairs, layout.buffers)
    pairs = _group_pairs(slots_RK, layout.slots_per_device, Q)

    def trip(index: jax.Array, inputs: tuple[jax.Array, jax.Array, Any], pairs: _Pairs) -> jax.Array:
        x_RD, weights_RK, params = inputs
        first = index * Q
        sizes_p = pairs.sizes_p if Q == R * K else _sizes_within(pairs.sizes_p, first, first + Q)
        rows: jax.Array = x_RD
        index_Q: jax.Array | None = jax.lax.dynamic_slice_in_dim(pairs.rows, first, Q)
        if weights_on_input:
            # Rows that no slot here owns may hold anything, and so may their weights.
            owned_Q1 = (jnp.arange(Q, dtype=jnp.int32) < jnp.sum(sizes_p, dtype=jnp.int32))[:, None]
            pair_Q = jax.lax.dynamic_slice_in_dim(pairs.order, first, Q)
            weights_Q1 = jnp.where(owned_Q1, weights_RK.reshape(-1)[pair_Q][:, None], 0)
            rows_QD = jnp.where(owned_Q1, x_RD[index_Q], 0).astype(weights_Q1.dtype) * weights_Q1
            rows, index_Q = rows_QD.astype(x_RD.dtype), None
        out_QD = experts.apply(params, rows, index_Q, sizes_p, sum_dtype(x_RD.dtype))
        here_RK = (pairs.places >= first) & (pairs.places < first + Q)
        factors_RK = jnp.ones_like(weights_RK) if weights_on_input else weights_RK
        return weighted_sum(factors_RK, out_QD, jnp.where(here_RK, pairs.places - first, -1))

    trips = 1 if Q == R * K else -(-jnp.sum(pairs.sizes_p, dtype=jnp.int32) // Q)
    return sum_rounds(Bodies(trip, trip), trips, (x_RD, weights_RK, experts.params), pairs)


def _group_pairs(slots_RK: jax.Array, p: int, Q: int) -> _Pairs:
    (R, K), N = slots_RK.shape, slots_RK.size
    here_RK = (slots_RK >= 0) & (slots_RK < p)
    # The barrier makes an array of them: XLA would look up a choice's slot again for every comparison.
    key_N = jax.lax.optimization_barrier(jnp.where(here_RK, slots_RK, p).astype(jnp.int32).reshape(N))
    pair_N, slot_p = jnp.arange(N, dtype=jnp.int32), jnp.arange(p, dtype=jnp.int32)
    # A comparison with every slot is one loop everywhere, where a scatter-add is a serial one on CPU. Sums of rows, not of
    # columns, for which XLA may store all of the comparisons first.
    sizes_p = jnp.sum(key_N[None] == slot_p[:, None], axis=1, dtype=jnp.int32)
    if N <= _MOST_COMPARED:
        number_N = key_N * N + pair_N
        place_N = jnp.sum(number_N[None] < number_N[:, None], axis=1, dtype=jnp.int32)
        at_NN = place_N[None] == pair_N[:, None]
        order_N = jnp.sum(jnp.where(at_NN, pair_N[None], 0), axis=1, dtype=jnp.int32)
        # Not the order over K, which would be a kernel of its own.
        row_R1 = jnp.arange(R, dtype=jnp.int32)[:, None]
        rows_N = jnp.sum(jnp.where(at_NN.reshape(N, R, K), row_R1[None], 0), axis=(1, 2), dtype=jnp.int32)
    else:
        order_N = jnp.argsort(key_N, stable=True).astype(jnp.int32)
        rows_N = order_N // K
        place_N = jnp.zeros(N, jnp.int32).at[order_N].set(pair_N, unique_indices=True)
    order, rows = (jnp.pad(array_N, (0, -N % Q)) for array_N in (order_N, rows_N))
    return _Pairs(order, rows, sizes_p, jnp.where(key_N < p, place_N, -1).reshape(R, K))


def _sizes_within(sizes_p: jax.Array, first: jax.Array, end: jax.Array) -> jax.Array:
    """Sizes of the groups' parts at the places from `first` to `end`."""
    ends_p = jnp.cumsum(sizes_p, dtype=jnp.int32)
    return jnp.clip(ends_p, first, end) - jnp.clip(ends_p - sizes_p, first, end)


def weighted_sum(factors_RK: jax.Array, rows_QD: jax.Array, places_RK: jax.Array) -> jax.Array:
    """Σ_k factor_k · rows[place_k] in the factors' dtype, [R, D]; a place of -1 adds nothing, whatever stands there.

    A sum of gathers, which XLA makes one loop of; a gather of [R, K, D] would be stored.
    """
    dtype = factors_RK.dtype
    # The barrier makes an array of them: XLA may else compute each choice's part by a kernel of its own. They are masked
    # before it, too, so that XLA has use for the places in that kernel.
    factors_RK = jax.lax.optimization_barrier(jnp.where(places_RK >= 0, factors_RK, 0))
    y_RD = jnp.zeros((factors_RK.shape[0], rows_QD.shape[1]), dtype)
    for k in range(factors_RK.shape[1]):
        place_R = places_RK[:, k]
        here_R1 = (place_R >= 0)[:, None]
        # Both sides of the product, not a factor of 0 nor the product alone: in the sum or in its gradient that would
        # carry an infinity of one token over to another.
        rows_RD = jnp.where(here_R1, rows_QD[jnp.maximum(place_R, 0)].astype(dtype), 0)
        y_RD += jnp.where(here_R1, factors_RK[:, k, None], 0) * rows_RD
    return y_RD
