"""The exchange in bounded rounds that all_to_all and ragged_all_to_all share.

Each device sends each of its tokens once to every device with one of the token's experts, at most C rows to each device
in a round, whatever the routing. There the row meets all of its experts, and one sum comes back. The number of rounds is
the mesh-wide maximum of need / C: even routing takes one; skew takes more rounds, never more memory, and no row is ever
left behind. Where tp splits the experts, its ranks hold different tokens: rows are gathered over tp when they arrive, and
the partial sums are reduce-scattered over tp before they return, so nothing crosses the expert axes twice.

Letters here, beside the common ones of docs/concepts/letters.md: C rows of a round for each destination.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.dispatch.base import DispatchLayout, DispatchShape, DispatchStats, Experts
from jaxmoe.dispatch.collectives import Collective, CollectiveOp, distinct_destinations
from jaxmoe.dispatch.local import local_sums, pairs_per_trip, weighted_sum
from jaxmoe.dispatch.queues import SendQueues, capacity, fill_queues, slots_at, take_round
from jaxmoe.dispatch.rounds import Bodies, sum_rounds
from jaxmoe.dispatch.wire import pack_choices, pack_rows, unpack_choices, unpack_rows
from jaxmoe.numerics import sum_dtype

# Rows [n·C, ...], C for each device, to the rows of all devices for this one.
Transfer = Callable[[jax.Array], jax.Array]
# (places used for each destination [n], C, layout) -> the transfer there and the one back. Places that nothing is
# written to hold zeros.
OpenTransfers = Callable[[jax.Array, int, DispatchLayout], tuple[Transfer, Transfer]]


def token_axes(layout: DispatchLayout) -> tuple[str, ...]:
    """Every device has tokens of its own."""
    return layout.axes.tokens


def run_exchange(
    open_transfers: OpenTransfers,
    x_TD: jax.Array,
    slots_TK: jax.Array,
    weights_TK: jax.Array,
    experts: Experts,
    layout: DispatchLayout,
    weights_on_input: bool = False,
) -> tuple[jax.Array, DispatchStats]:
    """Exchange rows over the expert axes until all have been served; see `RunDispatch`."""
    (T, K), n, p = slots_TK.shape, layout.num_devices, layout.slots_per_device
    C = capacity(T, K, layout)
    partial_axes = layout.partial_axes if layout.num_partial > 1 else ()
    queues = fill_queues(slots_TK, n, p, C)

    def one_round(
        wire_dtype: str | None,
        index: jax.Array,
        inputs: tuple[jax.Array, jax.Array, Any],
        constants: tuple[jax.Array, SendQueues],
    ) -> jax.Array:
        (x_TD, weights_TK, params), (slots_TK, queues) = inputs, constants
        now = take_round(queues, index, C)
        there, back = open_transfers(now.sizes_n, C, layout)

        sent_nCK = slots_at(slots_TK[now.tokens], jnp.arange(n, dtype=jnp.int32)[:, None, None], p)
        sent_nCK = jnp.where(jnp.arange(C, dtype=jnp.int32)[None, :, None] < now.sizes_n[:, None, None], sent_nCK, -1)
        token_R = now.tokens.reshape(-1)
        x_RD, slots_RK, weights_RK = _deliver(
            there, x_TD[token_R], sent_nCK.reshape(-1, K), weights_TK[token_R], partial_axes, wire_dtype
        )
        y_RD = local_sums(
            x_RD,
            slots_RK,
            weights_RK,
            experts._replace(params=params),
            layout,
            expected_pairs=layout.num_partial * T * K,
            weights_on_input=weights_on_input,
        )
        if partial_axes:
            y_RD = jax.lax.psum_scatter(y_RD, partial_axes, tiled=True)
        out_RD = back(y_RD.astype(x_TD.dtype))
        return weighted_sum(jnp.ones(now.places.shape, sum_dtype(x_TD.dtype)), out_RD, now.places)

    # The bound is the same on every device of the mesh: collectives in the loop meet their partners.
    rounds = 1 if C == T else jax.lax.pmax(-(-jnp.max(queues.lengths_n) // C), layout.axes.all)
    # A rounded row is no differentiable function of the row: the gradient is that of rows sent as they are.
    bodies = Bodies(partial(one_round, layout.wire_dtype), partial(one_round, None), first_apart=True)
    y_TD = sum_rounds(bodies, rounds, (x_TD, weights_TK, experts.params), (slots_TK, queues))
    return y_TD, DispatchStats(rounds=jnp.int32(rounds), rows_sent_n=queues.lengths_n)


def _deliver(
    there: Transfer,
    x_RD: jax.Array,
    slots_RK: jax.Array,
    weights_RK: jax.Array,
    partial_axes: tuple[str, ...],
    wire_dtype: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows and choices to the devices of their experts, and there to every rank with a part of those."""
    K = slots_RK.shape[1]

    def send(rows: jax.Array) -> jax.Array:
        return jax.lax.all_gather(there(rows), partial_axes, tiled=True) if partial_axes else there(rows)

    choices_R2K = pack_choices(slots_RK, weights_RK)
    if wire_dtype is None:
        return send(x_RD), *unpack_choices(send(choices_R2K))
    bits_RD, scale_R1 = pack_rows(x_RD, wire_dtype)
    bits_RD, metadata = send(bits_RD), send(jnp.concatenate([choices_R2K, scale_R1.astype(choices_R2K.dtype)], axis=1))
    return unpack_rows(bits_RD, metadata[:, 2 * K :], wire_dtype, x_RD.dtype), *unpack_choices(metadata[:, : 2 * K])


def exchange_collectives(op: CollectiveOp, shape: DispatchShape) -> tuple[Collective, ...]:
    """Rows and choices there, sums back; between them what tp ranks exchange; see `Dispatch.collectives`."""
    layout, K, D = shape.layout, shape.choices, shape.width
    n, axes = layout.num_devices, layout.expert_axes
    t, partial_axes = layout.num_partial, layout.partial_axes
    own = shape.tokens_per_device(layout.axes.tokens)
    C = capacity(own, K, layout)
    rows = n * C
    payload = shape.tokens / layout.size(layout.axes.tokens) * distinct_destinations(K, layout.num_slots, n) / rows
    width = 2 * K * 4
    wire_itemsize = shape.itemsize
    if layout.wire_dtype is not None:
        wire_itemsize, width = 1, width + 4
    found = [
        Collective(op=op, axes=axes, devices=n, bytes=rows * D * wire_itemsize, payload=payload),
        Collective(op=op, axes=axes, devices=n, bytes=rows * width, payload=None),
        Collective(op="all-gather", axes=partial_axes, devices=t, bytes=t * rows * D * wire_itemsize, payload=payload),
        Collective(op="all-gather", axes=partial_axes, devices=t, bytes=t * rows * width, payload=None),
        Collective(op="reduce-scatter", axes=partial_axes, devices=t, bytes=t * rows * D * 4, payload=payload),
        Collective(op=op, axes=axes, devices=n, bytes=rows * D * shape.itemsize, payload=payload),
    ]
    if own > C:
        found.append(
            Collective(
                op="all-reduce", axes=layout.axes.all, devices=layout.size(layout.axes.all), bytes=4, payload=None
            )
        )
    return tuple(found)


def exchange_memory_bytes(shape: DispatchShape) -> float:
    """Send and receive buffers, the rows of all local pairs, and a float32 sum a row, each written once."""
    own = shape.tokens_per_device(shape.layout.axes.tokens)
    rows = shape.layout.num_devices * capacity(own, shape.choices, shape.layout)
    return exchange_workspace_bytes(shape) + 4 * rows * shape.width * shape.itemsize


def exchange_workspace_bytes(shape: DispatchShape) -> float:
    """Bytes while the experts compute: rows received, those of all local pairs in and out, and float32 sums."""
    layout, K = shape.layout, shape.choices
    own = shape.tokens_per_device(layout.axes.tokens)
    received = layout.num_partial * layout.num_devices * capacity(own, K, layout)
    pairs = pairs_per_trip(received, K, layout.num_partial * own * K, layout.buffers)
    return shape.width * ((received + pairs) * (shape.itemsize + 4) + own * 4)
