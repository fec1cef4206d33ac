"""Replicated dispatch: every expert-parallel device sees all tokens and computes its own experts.

No row is exchanged; one psum adds up what the devices computed. Best for few tokens.
"""

import jax
import jax.numpy as jnp

from jaxmoe.dispatch.base import (
    ApplyExperts,
    Dispatch,
    DispatchCost,
    DispatchLayout,
    DispatchStats,
    apply_grouped,
    weighted_sum,
)
from jaxmoe.mesh import AXES, TP


def token_axes(layout: DispatchLayout) -> tuple[str, ...]:
    """Tokens are split over the axes that neither share experts nor split one."""
    return tuple(axis for axis in AXES if axis not in layout.expert_axes and axis != TP)


def run(
    x_TD: jax.Array,
    slots_TK: jax.Array,
    weights_TK: jax.Array,
    apply_experts: ApplyExperts,
    layout: DispatchLayout,
    weights_on_input: bool = False,
) -> tuple[jax.Array, DispatchStats]:
    """Compute this device's share of every token's sum, then add up the shares."""
    p = layout.slots_per_device
    # Another device's slot falls outside 0..p-1 and so into no group.
    local_TK = jnp.where(slots_TK >= 0, slots_TK - jax.lax.axis_index(layout.expert_axes) * p, -1)
    before_TK, after_TK = (weights_TK, jnp.ones_like(weights_TK)) if weights_on_input else (None, weights_TK)
    rows_TKD = apply_grouped(x_TD, local_TK, apply_experts, p, jnp.dtype(jnp.float32), before_TK)
    y_TD = weighted_sum(after_TK, rows_TKD)
    return jax.lax.psum(y_TD, layout.expert_axes + layout.partial_axes), DispatchStats(rounds=jnp.int32(0))


def cost(T: int, K: int, D: int, itemsize: int, layout: DispatchLayout) -> DispatchCost:
    """Tokens gathered over the expert axes, rows of all K choices there and back, a ring all-reduce of float32 sums."""
    n = layout.num_devices
    wire = (n - 1) / n * T * D * (itemsize + 2 * 4)
    return DispatchCost(wire, memory_bytes=T * K * D * (itemsize + 2 * 4), collectives=2 if n > 1 else 0)


REPLICATED = Dispatch("replicated", token_axes, run, cost)
