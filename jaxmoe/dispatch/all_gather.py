"""All-gather dispatch: every device is sent all tokens, computes its own experts, and the sums are reduce-scattered.

Nothing is sorted by destination and nothing depends on the routing but the experts' own work. It sends a token to n
devices where an exchange sends it to Dst of them, so it wins where a token reaches most devices anyway, and for few
tokens, where there are fewer collectives to wait for.
"""

import jax
import jax.numpy as jnp

from jaxmoe.dispatch.base import Dispatch, DispatchLayout, DispatchShape, DispatchStats, Experts
from jaxmoe.dispatch.collectives import Collective
from jaxmoe.dispatch.local import local_sums, pairs_per_trip
from jaxmoe.dispatch.queues import slots_at
from jaxmoe.dispatch.wire import pack_choices, unpack_choices


def token_axes(layout: DispatchLayout) -> tuple[str, ...]:
    """Every device has tokens of its own."""
    return layout.axes.tokens


def run(
    x_TD: jax.Array,
    slots_TK: jax.Array,
    weights_TK: jax.Array,
    experts: Experts,
    layout: DispatchLayout,
    weights_on_input: bool = False,
) -> tuple[jax.Array, DispatchStats]:
    """Gather tokens and choices over the devices that serve them, and scatter what they compute; see `RunDispatch`."""
    (T, K), n = slots_TK.shape, layout.num_devices
    everyone = layout.size(layout.serving_axes)
    choices_T2K = pack_choices(slots_TK, weights_TK)
    if everyone > 1:
        x_TD = jax.lax.all_gather(x_TD, layout.serving_axes, tiled=True)
        choices_T2K = jax.lax.all_gather(choices_T2K, layout.serving_axes, tiled=True)
    slots_RK, weights_RK = unpack_choices(choices_T2K)
    y_RD = local_sums(
        x_TD,
        slots_at(slots_RK, jax.lax.axis_index(layout.expert_axes), layout.slots_per_device),
        weights_RK,
        experts,
        layout,
        expected_pairs=everyone * T * K / n,
        weights_on_input=weights_on_input,
    )
    if everyone > 1:
        y_RD = jax.lax.psum_scatter(y_RD, layout.serving_axes, tiled=True)
    return y_RD, DispatchStats(rounds=jnp.int32(0), rows_sent_n=jnp.full(n, T, jnp.int32))


def collectives(shape: DispatchShape) -> tuple[Collective, ...]:
    """Tokens and choices gathered, float32 sums scattered."""
    layout, K, D = shape.layout, shape.choices, shape.width
    own, axes = shape.tokens_per_device(layout.axes.tokens), layout.serving_axes
    g, payload = layout.size(axes), shape.fill(layout.axes.tokens)
    return (
        Collective(op="all-gather", axes=axes, devices=g, bytes=g * own * D * shape.itemsize, payload=payload),
        Collective(op="all-gather", axes=axes, devices=g, bytes=g * own * 2 * K * 4, payload=None),
        Collective(op="reduce-scatter", axes=axes, devices=g, bytes=g * own * D * 4, payload=payload),
    )


def memory_bytes(shape: DispatchShape) -> float:
    """Gathered tokens, the rows of all local pairs in and out, and a float32 sum a token."""
    layout, K = shape.layout, shape.choices
    rows = shape.tokens_per_device(layout.axes.tokens) * layout.size(layout.serving_axes)
    pairs = pairs_per_trip(rows, K, rows * K / layout.num_devices, layout.buffers)
    return shape.width * (rows * (shape.itemsize + 4) + pairs * (shape.itemsize + 4))


ALL_GATHER = Dispatch(
    name="all_gather", token_axes=token_axes, run=run, collectives=collectives, memory_bytes=memory_bytes
)
