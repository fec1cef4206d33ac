"""The backend over `jax.lax.ragged_dot_general`: what XLA offers, to compare the others with.

XLA (jax 0.10 to 0.12) expands it, on CPU as on GPU, to one dense product over G·K: time and memory grow with the number
of groups. With matrices as they stand in torch, (out, in), it first copies the whole stack to (in, out). Never chosen by
"auto".

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.grouped_matmul.combine import Combine
from jaxmoe.kernels.grouped_matmul.gradient import with_gradient_of
from jaxmoe.kernels.grouped_matmul.row_loops import filled_groups
from jaxmoe.numerics import sum_dtype

# Rows [R, K] in groups along dim 0, and a matrix [N, K] a group, both contracted over K.
_ROWS_BY_MATRICES = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[0]
)


def grouped_matmul(
    lhs_RK: jax.Array,
    rhs_GNK: jax.Array,
    group_sizes_G: jax.Array,
    *,
    out_dtype: jnp.dtype,
    device_kind: str | None = None,
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r], as `Kernels` says; the same on all kinds of devices."""
    out = jax.ShapeDtypeStruct((lhs_RK.shape[0], rhs_GNK.shape[1]), out_dtype)
    return _map_rows(_affine, lhs_RK, [rhs_GNK, None], group_sizes_G, out)


def expert_mlp(
    x_RD: jax.Array,
    w_up_pND: jax.Array,
    w_down_pDF: jax.Array,
    group_sizes_p: jax.Array,
    *,
    b_up_pN: jax.Array | None,
    b_down_pD: jax.Array | None,
    combine: Combine,
    out_dtype: jnp.dtype,
    device_kind: str | None = None,
) -> jax.Array:
    """y = W_down[g] @ combine(W_up[g] @ x + b_up[g]) + b_down[g]; see `Kernels.expert_mlp`."""

    def mlp(sizes_p: jax.Array, x_RD: jax.Array, w_up: Any, b_up: Any, w_down: Any, b_down: Any) -> jax.Array:
        h_RF = combine(_affine(sizes_p, x_RD, w_up, b_up)).astype(x_RD.dtype)
        return _affine(sizes_p, h_RF, w_down, b_down)

    weights = [w_up_pND, b_up_pN, w_down_pDF, b_down_pD]
    return _map_rows(mlp, x_RD, weights, group_sizes_p, jax.ShapeDtypeStruct(x_RD.shape, out_dtype))


# From group sizes, rows and weights to a row of sums for each row; any for those that no group owns.
RowsFn = Callable[..., jax.Array]


def _affine(sizes_G: jax.Array, x_RK: jax.Array, w_GNK: jax.Array, b_GN: jax.Array | None) -> jax.Array:
    dtype = sum_dtype(x_RK.dtype)
    y_RN = lax.ragged_dot_general(x_RK, w_GNK, sizes_G, _ROWS_BY_MATRICES, preferred_element_type=dtype)
    if b_GN is None:
        return y_RN
    group_R = jnp.repeat(jnp.arange(len(sizes_G), dtype=jnp.int32), sizes_G, total_repeat_length=len(x_RK))
    return y_RN + b_GN[group_R].astype(dtype)


def _map_rows(
    fn: RowsFn, x_RK: jax.Array, weights: list[jax.Array | None], group_sizes_G: jax.Array, out: jax.ShapeDtypeStruct
) -> jax.Array:
    """`fn` of the rows that a group owns, zeros for the others; differentiable in `x_RK` and `weights`."""
    stacks = jax.tree.leaves(weights)
    if 0 in x_RK.shape or any(0 in stack.shape for stack in stacks):
        return jnp.zeros(out.shape, out.dtype)
    start_G, end_G, _, _ = filled_groups(len(x_RK), group_sizes_G)
    owned_R1 = (jnp.arange(len(x_RK), dtype=jnp.int32) < end_G[-1])[:, None]

    def forward(arrays: Any, sizes_G: jax.Array) -> jax.Array:
        return fn(sizes_G, *arrays)

    def widened(arrays: Any, sizes_G: jax.Array) -> jax.Array:
        return fn(sizes_G, *jax.tree.map(lambda array: array.astype(sum_dtype(array.dtype)), arrays))

    # The mask comes before the product, too: expanded, it multiplies every row with zeros for all groups but one. The
    # gradient is XLA's own, of widened inputs: it keeps no activation and rounds once.
    arrays = [jnp.where(owned_R1, x_RK, 0), *weights]
    y_RN = with_gradient_of(widened, forward, arrays, end_G - start_G)
    return jnp.where(owned_R1, y_RN, 0).astype(out.dtype)
