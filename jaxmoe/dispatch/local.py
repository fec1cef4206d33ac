"""A device's own experts applied to rows that each chose several of them; one sum a row comes back.

Letters here, beside the common ones of docs/concepts/letters.md: N rows times choices, Q pairs of a trip.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.dispatch.base import Buffers, DispatchLayout, Experts
from jaxmoe.dispatch.rounds import Bodies, sum_rounds
from jaxmoe.numerics import sum_dtype


class _Pairs(NamedTuple):
    """(row, choice) pairs of a device, grouped by slot.

    Attributes:
        order: int32 [R·K, then 0 up to a multiple of Q], the pair at each place: first those of slot 0, and so on,
            last those whose expert is not here.
        sizes_p: int32 [p], pairs of each slot.
        places: int32 [R, K], where each pair stands.
    """

    order: jax.Array
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
        pair_Q = jax.lax.dynamic_slice_in_dim(pairs.order, first, Q)
        ends_p = jnp.cumsum(pairs.sizes_p, dtype=jnp.int32)
        in_trip = jnp.clip(jnp.stack([ends_p - pairs.sizes_p, ends_p]), first, first + Q)
        rows: jax.Array = x_RD
        index_Q: jax.Array | None = pair_Q // K
        if weights_on_input:
            # Rows that no slot here owns may hold anything, and so may their weights.
            owned_Q1 = (jnp.arange(Q, dtype=jnp.int32) < ends_p[-1] - first)[:, None]
            weights_Q1 = jnp.where(owned_Q1, weights_RK.reshape(-1)[pair_Q][:, None], 0)
            rows_QD = jnp.where(owned_Q1, x_RD[index_Q], 0).astype(weights_Q1.dtype) * weights_Q1
            rows, index_Q = rows_QD.astype(x_RD.dtype), None
        out_QD = experts.apply(params, rows, index_Q, in_trip[1] - in_trip[0], sum_dtype(x_RD.dtype))
        here_RK = (pairs.places >= first) & (pairs.places < jnp.minimum(first + Q, ends_p[-1]))
        factors_RK = jnp.ones_like(weights_RK) if weights_on_input else weights_RK
        return weighted_sum(factors_RK, out_QD, jnp.where(here_RK, pairs.places - first, -1))

    trips = 1 if Q == R * K else -(-jnp.sum(pairs.sizes_p, dtype=jnp.int32) // Q)
    return sum_rounds(Bodies(trip, trip), trips, (x_RD, weights_RK, experts.params), pairs)


def _group_pairs(slots_RK: jax.Array, p: int, Q: int) -> _Pairs:
    slots_N = slots_RK.reshape(-1)
    N = slots_N.shape[0]
    key_N = jnp.where((slots_N >= 0) & (slots_N < p), slots_N, p).astype(jnp.int32)
    order_N = jnp.argsort(key_N, stable=True).astype(jnp.int32)
    place_N = jnp.zeros(N, jnp.int32).at[order_N].set(jnp.arange(N, dtype=jnp.int32), unique_indices=True)
    # A comparison with every slot vectorizes everywhere, where a scatter-add is a serial loop on CPU.
    sizes_p = jnp.sum(key_N[:, None] == jnp.arange(p, dtype=jnp.int32)[None], axis=0, dtype=jnp.int32)
    return _Pairs(jnp.pad(order_N, (0, -N % Q)), sizes_p, place_N.reshape(slots_RK.shape))


def weighted_sum(factors_RK: jax.Array, rows_QD: jax.Array, places_RK: jax.Array) -> jax.Array:
    """Σ_k factor_k · rows[place_k] in the factors' dtype, [R, D]; a place of -1 adds nothing, whatever stands there.

    A sum of gathers, which XLA makes one loop of; a gather of [R, K, D] would be stored.
    """
    dtype = factors_RK.dtype
    y_RD = jnp.zeros((factors_RK.shape[0], rows_QD.shape[1]), dtype)
    for k in range(factors_RK.shape[1]):
        place_R = places_RK[:, k]
        here_R1 = (place_R >= 0)[:, None]
        # Both sides of the product, not a factor of 0 nor the product alone: in the sum or in its gradient that would
        # carry an infinity of one token over to another.
        rows_RD = jnp.where(here_R1, rows_QD[jnp.maximum(place_R, 0)].astype(dtype), 0)
        y_RD += jnp.where(here_R1, factors_RK[:, k, None], 0) * rows_RD
    return y_RD
