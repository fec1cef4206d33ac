"""The oracle: a dense product with every group's matrix, and a mask. Obviously right, and as slow as that."""

import jax
import jax.numpy as jnp

from jaxmoe.kernels.grouped_matmul.activations import Activation


def grouped_matmul(
    lhs_RK: jax.Array, rhs_GNK: jax.Array, group_sizes_G: jax.Array, *, out_dtype: jnp.dtype
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r]; see `api.grouped_matmul`."""
    R, (G, N, _) = lhs_RK.shape[0], rhs_GNK.shape
    row_R = jnp.arange(R)
    out_RN = jnp.zeros((R, N), jnp.float32)
    end = jnp.int32(0)
    for g in range(G):
        start, end = end, end + group_sizes_G[g]
        own_R1 = ((row_R >= start) & (row_R < end))[:, None]
        product_RN = jnp.matmul(
            lhs_RK, rhs_GNK[g].T, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
        )
        out_RN = jnp.where(own_R1, product_RN, out_RN)
    return out_RN.astype(out_dtype)


def expert_mlp(
    x_RD: jax.Array,
    w_gate_up_p2FD: jax.Array,
    w_down_pDF: jax.Array,
    group_sizes_p: jax.Array,
    *,
    activation: Activation,
    out_dtype: jnp.dtype,
) -> jax.Array:
    """y = W_down[g] @ (act(W_gate[g] @ x) * (W_up[g] @ x)); see `api.expert_mlp`."""
    gate_RF = grouped_matmul(x_RD, w_gate_up_p2FD[:, 0], group_sizes_p, out_dtype=jnp.float32)
    up_RF = grouped_matmul(x_RD, w_gate_up_p2FD[:, 1], group_sizes_p, out_dtype=jnp.float32)
    h_RF = (activation(gate_RF) * up_RF).astype(x_RD.dtype)
    return grouped_matmul(h_RF, w_down_pDF, group_sizes_p, out_dtype=out_dtype)
