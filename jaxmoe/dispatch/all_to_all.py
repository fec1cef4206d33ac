"""All-to-all dispatch in bounded rounds: every token reaches its experts, in a workspace fixed at compile time.

Each device sorts its rows (token, choice) by destination slot. In one round it sends at
most C rows to each other device, whatever the routing; the number of rounds is the
mesh-wide maximum of need / C. Even routing takes one round; skew takes more rounds, never
more memory, and no row is ever left behind.
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
    group_rows,
    invert,
    weigh,
    weighted_sum,
)
from jaxmoe.mesh import AXES, DP, EP

# Room above the even share, so that the usual unevenness of routing still takes one round.
_HEADROOM = 1.5
_MIN_CAPACITY = 8


def token_axes(layout: DispatchLayout) -> tuple[str, ...]:
    """Every device has tokens of its own, except that tp ranks share theirs where tp splits the experts' width."""
    return tuple(axis for axis in AXES if axis in (DP, EP) or axis in layout.expert_axes)


def capacity(T: int, K: int, num_devices: int) -> int:
    """C, the rows one device sends to one other in a round, from shapes alone."""
    even_share = T * K / num_devices
    return min(T * K, max(_MIN_CAPACITY, -(-int(even_share * _HEADROOM + 1) // 8) * 8))


def run(
    x_TD: jax.Array,
    slots_TK: jax.Array,
    weights_TK: jax.Array,
    apply_experts: ApplyExperts,
    layout: DispatchLayout,
    weights_on_input: bool = False,
) -> tuple[jax.Array, DispatchStats]:
    """Exchange rows over the expert axes until all have been served."""
    (T, K), D = slots_TK.shape, x_TD.shape[1]
    n, p = layout.num_devices, layout.slots_per_device
    C = capacity(T, K, n)
    before_N, after_TK = weights_TK.reshape(-1), jnp.ones_like(weights_TK) if weights_on_input else weights_TK

    # Rows sorted by slot are sorted by destination too: device d's are one run of the order.
    order_N, slot_sizes_P = group_rows(slots_TK.reshape(-1), n * p)
    dest_sizes_n = jnp.sum(slot_sizes_P.reshape(n, p), axis=1)
    dest_starts_n = jnp.cumsum(dest_sizes_n) - dest_sizes_n
    dest_TK = jnp.where(slots_TK >= 0, slots_TK // p, 0)
    # The how-manieth row for its destination each (token, choice) is: it travels in round rank // C, at place rank % C.
    rank_TK = invert(order_N).reshape(T, K) - dest_starts_n[dest_TK]

    def exchange(rows: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(rows, layout.expert_axes, split_axis=0, concat_axis=0, tiled=True)

    def one_round(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        index, y_TD = state
        rank_C = index * C + jnp.arange(C)
        sent_nC = rank_C < dest_sizes_n[:, None]
        row_nC = order_N[jnp.where(sent_nC, dest_starts_n[:, None] + rank_C, 0)]
        slot_nC = jnp.where(sent_nC, slots_TK.reshape(-1)[row_nC] % p, -1)

        x_nCD = x_TD[row_nC // K]
        if weights_on_input:
            x_nCD = weigh(x_nCD, before_N[row_nC])
        x_RD = exchange(x_nCD.reshape(n * C, D))
        slot_R = exchange(slot_nC.reshape(n * C))
        out_RD = exchange(apply_grouped(x_RD, slot_R[:, None], apply_experts, p, x_TD.dtype)[:, 0])

        served_TK = (slots_TK >= 0) & (rank_TK // C == index)
        place_TK = jnp.where(served_TK, dest_TK * C + rank_TK % C, 0)
        return index + 1, y_TD + weighted_sum(jnp.where(served_TK, after_TK, 0), out_RD[place_TK])

    # The bound is the same on every device of the mesh: collectives in the loop meet their partners.
    rounds = jax.lax.pmax(-(-jnp.max(dest_sizes_n) // C), AXES)
    start = (jnp.int32(0), jnp.zeros((T, D), jnp.float32))
    _, y_TD = jax.lax.while_loop(lambda state: state[0] < rounds, one_round, start)
    if layout.partial_axes:
        y_TD = jax.lax.psum(y_TD, layout.partial_axes)
    return y_TD, DispatchStats(rounds=rounds)


def cost(T: int, K: int, D: int, itemsize: int, layout: DispatchLayout) -> DispatchCost:
    """One round, padding included: rows and slots there, results back, each row regrouped on both sides."""
    n, own = layout.num_devices, -(-T // layout.num_devices)
    rows = n * capacity(own, K, n)
    wire = 2 * (n - 1) / n * rows * D * itemsize
    return DispatchCost(wire, memory_bytes=(5 * rows * itemsize + own * K * 4) * D, collectives=4)


ALL_TO_ALL = Dispatch("all_to_all", token_axes, run, cost)
