"""Replicated dispatch: every expert-parallel device sees all tokens and computes its own experts.

No row is exchanged; one psum adds up what the devices computed. Best for few tokens.
"""

import jax
import jax.numpy as jnp

from jaxmoe.dispatch.base import Dispatch, DispatchLayout, DispatchShape, DispatchStats, Experts
from jaxmoe.dispatch.collectives import Collective
from jaxmoe.dispatch.local import local_sums, pairs_per_trip


def token_axes(layout: DispatchLayout) -> tuple[str, ...]:
    """Tokens are split over the axes that neither share experts nor split one."""
    return tuple(axis for axis in layout.axes.all if axis not in layout.serving_axes)


def run(
    x_TD: jax.Array,
    slots_TK: jax.Array,
    weights_TK: jax.Array,
    experts: Experts,
    layout: DispatchLayout,
    weights_on_input: bool = False,
) -> tuple[jax.Array, DispatchStats]:
    """Compute this device's share of every token's sum, then add up the shares."""
    (T, K), n, p = slots_TK.shape, layout.num_devices, layout.slots_per_device
    # Another device's slot falls outside 0..p-1 and so into no group.
    local_TK = jnp.where(slots_TK >= 0, slots_TK - jax.lax.axis_index(layout.expert_axes) * p, -1)
    y_TD = local_sums(
        x_TD, local_TK, weights_TK, experts, layout, expected_pairs=T * K / n, weights_on_input=weights_on_input
    )
    stats = DispatchStats(rounds=jnp.int32(0), rows_sent_n=jnp.zeros(n, jnp.int32))
    return jax.lax.psum(y_TD, layout.serving_axes), stats


def collectives(shape: DispatchShape) -> tuple[Collective, ...]:
    """The sum of the shares; float32."""
    own_axes, axes = token_axes(shape.layout), shape.layout.serving_axes
    size = shape.tokens_per_device(own_axes) * shape.width * 4
    devices, payload = shape.layout.size(axes), shape.fill(own_axes)
    return (Collective(op="all-reduce", axes=axes, devices=devices, bytes=size, payload=payload),)


def memory_bytes(shape: DispatchShape) -> float:
    """The rows of all local pairs in and out, and a float32 sum a token."""
    layout, K = shape.layout, shape.choices
    own = shape.tokens_per_device(token_axes(layout))
    pairs = pairs_per_trip(own, K, own * K / layout.num_devices, layout.buffers)
    return shape.width * (pairs * (shape.itemsize + 4) + own * 4)


REPLICATED = Dispatch(
    name="replicated", token_axes=token_axes, run=run, collectives=collectives, memory_bytes=memory_bytes
)
