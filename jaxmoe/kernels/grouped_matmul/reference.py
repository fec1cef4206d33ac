"""The oracle: a dense product with every group's matrix, and a mask. Obviously right, and as slow as that.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import jax
import jax.numpy as jnp

from jaxmoe.kernels.grouped_matmul.combine import Combine
from jaxmoe.kernels.grouped_matmul.quantized import Matrices, QuantizedStack, dequantize
from jaxmoe.numerics import sum_dtype


def grouped_matmul(
    lhs_RK: jax.Array,
    rhs_GNK: Matrices,
    group_sizes_G: jax.Array,
    *,
    out_dtype: jnp.dtype,
    device_kind: str | None = None,
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r], as `Kernels` says; the same on all kinds of devices."""
    if isinstance(rhs_GNK, QuantizedStack):
        lhs_RK, rhs_GNK = lhs_RK.astype(jnp.float32), dequantize(rhs_GNK)
    R, (G, N, _) = lhs_RK.shape[0], rhs_GNK.shape
    row_R = jnp.arange(R, dtype=jnp.int32)
    # What no group owns is kept out of gradients, where it would meet zeros, and NaN times zero is NaN.
    lhs_RK = jnp.where((row_R < jnp.sum(group_sizes_G, dtype=jnp.int32))[:, None], lhs_RK, 0)
    out_RN = jnp.zeros((R, N), sum_dtype(lhs_RK.dtype))
    end = jnp.int32(0)
    for g in range(G):
        start, end = end, end + group_sizes_G[g]
        own_R1 = ((row_R >= start) & (row_R < end))[:, None]
        product_RN = jnp.matmul(
            lhs_RK, rhs_GNK[g].T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=out_RN.dtype
        )
        out_RN = jnp.where(own_R1, product_RN, out_RN)
    return out_RN.astype(out_dtype)


def expert_mlp(
    x_RD: jax.Array,
    w_up_pND: Matrices,
    w_down_pDF: Matrices,
    group_sizes_p: jax.Array,
    *,
    b_up_pN: jax.Array | None,
    b_down_pD: jax.Array | None,
    combine: Combine,
    out_dtype: jnp.dtype,
    device_kind: str | None = None,
) -> jax.Array:
    """y = W_down[g] @ combine(W_up[g] @ x + b_up[g]) + b_down[g]; see `Kernels.expert_mlp`."""
    slot_R = jnp.repeat(jnp.arange(len(group_sizes_p), dtype=jnp.int32), group_sizes_p, total_repeat_length=len(x_RD))
    owned_R1 = (jnp.arange(len(x_RD), dtype=jnp.int32) < jnp.sum(group_sizes_p, dtype=jnp.int32))[:, None]
    wide = sum_dtype(x_RD.dtype)
    up_RN = grouped_matmul(x_RD, w_up_pND, group_sizes_p, out_dtype=wide)
    if b_up_pN is not None:
        up_RN += b_up_pN[slot_R].astype(wide)
    h_RF = combine(up_RN).astype(x_RD.dtype)
    y_RD = grouped_matmul(h_RF, w_down_pDF, group_sizes_p, out_dtype=wide)
    if b_down_pD is not None:
        y_RD += b_down_pD[slot_R].astype(wide)
    return jnp.where(owned_R1, y_RD, 0).astype(out_dtype)
