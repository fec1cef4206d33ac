"""What every dispatch backend is given, gives back, and shares.

A backend runs inside ``shard_map`` on one device's tokens. It brings each token to the
devices that hold its experts, has the experts applied there, and returns the weighted sum
at the token's home. Letters are design's; n is the number of devices that share the experts.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# (rows grouped by local slot [R, D], group sizes [p], dtype of the result) -> rows [R, D], zeros beyond the groups.
ApplyExperts = Callable[[jax.Array, jax.Array, jnp.dtype], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DispatchLayout:
    """How experts lie on the mesh; all of it known at compile time.

    Attributes:
        mesh_shape: ((axis, size), ...) of the whole mesh.
        expert_axes: mesh axes that the slot dim is sharded over.
        partial_axes: mesh axes over which expert outputs are partial sums (tp where it splits F).
        num_slots: physical slots P.
    """

    mesh_shape: tuple[tuple[str, int], ...]
    expert_axes: tuple[str, ...]
    partial_axes: tuple[str, ...]
    num_slots: int

    def size(self, axes: tuple[str, ...]) -> int:
        """Number of devices along `axes`."""
        product = 1
        for axis, size in self.mesh_shape:
            product *= size if axis in axes else 1
        return product

    @property
    def num_devices(self) -> int:
        """n, the devices that share the experts."""
        return self.size(self.expert_axes)

    @property
    def slots_per_device(self) -> int:
        """p."""
        return self.num_slots // self.num_devices


class DispatchCost(NamedTuple):
    """What a device moves in one call; its own experts' work is the same with every backend and left out.

    Attributes:
        wire_bytes: sent to other devices.
        memory_bytes: copied from place to place in its own memory.
        collectives: operations that all devices meet in.
    """

    wire_bytes: float
    memory_bytes: float
    collectives: int


class DispatchStats(NamedTuple):
    """What an exchange did, the same on every device.

    Attributes:
        rounds: int32, exchanges made; 0 where the backend exchanges no rows.
    """

    rounds: jax.Array


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """One backend.

    Attributes:
        name: its key in `DISPATCHES`.
        token_axes: mesh axes the token dim is split over when `run` is called; over all other
            axes each device is given the same tokens and returns the same sums.
        run: ``(x_TD, slots_TK, weights_TK, apply_experts, layout, weights_on_input) -> (y_TD float32, DispatchStats)``,
            where a slot of -1 means no expert, and a weight multiplies what goes into an expert or what comes out.
        cost: ``(T, K, D, itemsize, layout) -> DispatchCost`` of T tokens over all of `expert_axes`
            with even routing; what `jaxmoe.dispatch.choose` compares.
    """

    name: str
    token_axes: Callable[[DispatchLayout], tuple[str, ...]]
    run: Callable[
        [jax.Array, jax.Array, jax.Array, ApplyExperts, DispatchLayout, bool], tuple[jax.Array, DispatchStats]
    ]
    cost: Callable[[int, int, int, int, DispatchLayout], DispatchCost]


def group_rows(slots_R: jax.Array, slots_per_device: int) -> tuple[jax.Array, jax.Array]:
    """Sort rows by local slot; rows whose slot is outside 0..p-1 come last.

    Returns:
        int32 [R], the row that stands at each place after sorting, and int32 [p], rows of each slot.
    """
    valid_R = (slots_R >= 0) & (slots_R < slots_per_device)
    key_R = jnp.where(valid_R, slots_R, slots_per_device).astype(jnp.int32)
    order_R = jnp.argsort(key_R, stable=True).astype(jnp.int32)
    # A comparison with every slot vectorises everywhere, where a scatter-add is a serial loop on CPU.
    sizes_p = jnp.sum(key_R[:, None] == jnp.arange(slots_per_device), axis=0, dtype=jnp.int32)
    return order_R, sizes_p


def invert(order_R: jax.Array) -> jax.Array:
    """The inverse of a permutation: where each row went."""
    R = order_R.shape[0]
    return jnp.zeros(R, jnp.int32).at[order_R].set(jnp.arange(R, dtype=jnp.int32), unique_indices=True)


def apply_grouped(
    x_TD: jax.Array,
    slots_TK: jax.Array,
    apply_experts: ApplyExperts,
    p: int,
    dtype: jnp.dtype,
    input_weights_TK: jax.Array | None = None,
) -> jax.Array:
    """Apply experts to every (token, choice); [T, K, D], zeros where the slot is not one of this device's p."""
    T, K = slots_TK.shape
    order_N, sizes_p = group_rows(slots_TK.reshape(-1), p)
    rows_ND = x_TD[order_N // K]
    if input_weights_TK is not None:
        rows_ND = weigh(rows_ND, input_weights_TK.reshape(-1)[order_N])
    out_ND = apply_experts(rows_ND, sizes_p, dtype)
    return out_ND[invert(order_N)].reshape(T, K, -1)


def weigh(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Rows [..., D] times one weight each [...], in the rows' dtype."""
    return (rows * weights[..., None]).astype(rows.dtype)


def weighted_sum(weights_TK: jax.Array, rows_TKD: jax.Array) -> jax.Array:
    """Σ_k weights · rows in float32, [T, D]."""
    return jnp.sum(weights_TK[..., None] * rows_TKD.astype(jnp.float32), axis=1)
