"""The experts of a device with low-rank adapters beside them, applied to rows that are grouped by slot and adapter.

A dispatch sorts rows by slot. With adapters it is given finer slots: slot s and adapter l make the fine slot
s·(L + 1) + l + 1, and no adapter s·(L + 1). They lie on the same devices, in the same order, so a row's adapter travels
with its expert, through every dispatch. Letters: as in `jaxmoe.layers.low_rank`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmoe.config import MoEConfig
from jaxmoe.dispatch import Experts
from jaxmoe.kernels.grouped_matmul import combine_halves, grouped_matmul
from jaxmoe.kernels.grouped_matmul.quantized import as_matrices
from jaxmoe.kernels.grouped_matmul.row_loops import take_rows
from jaxmoe.layers.experts import expert_matrices
from jaxmoe.numerics import sum_dtype


class ExpertFactors(NamedTuple):
    """The factors of a layer's experts, dim 0 the physical slots; also holds their partition specs.

    A field is None where no adapter changes its stack.

    Attributes:
        w_gate_up_lora_a: [P, L, r, X].
        w_gate_up_lora_b: [P, L, 2, F, r]; [P, L, 1, F, r] for experts without a gate.
        w_down_lora_a: [P, L, r, F].
        w_down_lora_b: [P, L, X, r].
    """

    w_gate_up_lora_a: Any = None
    w_gate_up_lora_b: Any = None
    w_down_lora_a: Any = None
    w_down_lora_b: Any = None

    @property
    def adapters(self) -> int:
        """L, the adapters that there is room for."""
        return next(factor.shape[1] for factor in self if factor is not None)


def fine_slots(slots_TK: jax.Array, adapter_ids_T: jax.Array, adapters: int) -> jax.Array:
    """Fine slots of the choices of tokens with these adapters, -1 where there is no expert."""
    return jnp.where(slots_TK >= 0, slots_TK * (adapters + 1) + adapter_ids_T[:, None] + 1, -1)


def adapted_experts(plain: Experts, factors: ExpertFactors, config: MoEConfig, **kernels: Any) -> Experts:
    """This device's experts as a dispatch applies them to rows of fine slots.

    Args:
        plain: experts without adapters, see `jaxmoe.layers.experts.local_experts`.
        factors: this device's part of the factors.
        config: config of the layer.
        kernels: backend and device_kind of `grouped_matmul`.
    """

    def apply(
        params: Any, rows_TD: jax.Array, index_R: jax.Array | None, sizes: jax.Array, dtype: DTypeLike
    ) -> jax.Array:
        stacks, factors = params
        # Several products are of the same rows.
        return _expert_mlp(stacks, factors, take_rows(rows_TD, index_R), sizes, config, kernels).astype(dtype)

    return Experts(apply, (plain.params, factors))


def _expert_mlp(
    stacks: Any,
    factors: ExpertFactors,
    rows_RX: jax.Array,
    sizes: jax.Array,
    config: MoEConfig,
    kernels: dict[str, Any],
) -> jax.Array:
    """W_down (act(W_gate x) · W_up x) with W + B_l A_l for each W; sums are not rounded."""
    L, sums = factors.adapters, sum_dtype(rows_RX.dtype)
    group_R = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(len(rows_RX), dtype=jnp.int32), side="right")
    owned_R1 = (group_R < len(sizes))[:, None]
    slot_R = jnp.minimum(group_R, len(sizes) - 1) // (L + 1)
    low_rank = _grouped_low_rank(sizes.reshape(-1, L + 1), owned_R1 & (group_R % (L + 1) > 0)[:, None], kernels)
    sizes_p = jnp.sum(sizes.reshape(-1, L + 1), axis=1, dtype=jnp.int32)

    up, down, rounding = expert_matrices(stacks)

    def project(x_RK: jax.Array, name: str, w: Any, b: jax.Array | None, rounding: dict[str, Any]) -> jax.Array:
        y_RN = grouped_matmul(x_RK, as_matrices(w), sizes_p, out_dtype=sums, **rounding, **kernels)
        if b is not None:
            y_RN = y_RN + jnp.where(owned_R1, b.reshape(len(b), -1)[slot_R], 0).astype(sums)
        factor_a, factor_b = (getattr(factors, f"w_{name}_lora_{side}") for side in "ab")
        return y_RN if factor_a is None else y_RN + low_rank(x_RK, factor_a, factor_b)

    combine = combine_halves(config.activation, config.activation_limit, gated=config.gated)
    # Inputs are rounded for the packed base alone; of the two products only that of h may have its columns split.
    scales_p2, split_over = rounding.pop("input_scales_p2", None), rounding.pop("split_over", ())
    scales = ({}, {}) if scales_p2 is None else [{"input_scales_G": scales_p2[:, side]} for side in range(2)]
    both_RN = project(rows_RX, "gate_up", up, stacks.b_gate_up, {**rounding, **scales[0]})
    h_RF = combine(both_RN).astype(rows_RX.dtype)
    return project(h_RF, "down", down, stacks.b_down, {**rounding, **scales[1], "split_over": split_over})


def _grouped_low_rank(
    sizes: jax.Array, adapted_R1: jax.Array, kernels: dict[str, Any]
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The function of rows, A [p, L, r, K] and B [p, L, ..., r] that gives B_l A_l x, zeros for rows without an adapter."""
    # Rows without an adapter stand before those with the first, and go through its factors with them; their part is dropped.
    sizes_g = jnp.concatenate([sizes[:, :1] + sizes[:, 1:2], sizes[:, 2:]], axis=1).reshape(-1)

    def low_rank(x_RK: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        r, groups = a.shape[2], len(sizes_g)
        h_Rr = grouped_matmul(x_RK, a.reshape(groups, r, -1), sizes_g, **kernels)
        h_Rr = jnp.where(adapted_R1, h_Rr, 0)
        return grouped_matmul(h_Rr, b.reshape(groups, -1, r), sizes_g, out_dtype=sum_dtype(x_RK.dtype), **kernels)

    return low_rank
