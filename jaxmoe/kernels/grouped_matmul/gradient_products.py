"""The backward pass in grouped products, for kernels that have all three kinds of them.

    a = W_up x + b_up      h = combine(a)      y = W_down h + b_down

    dh = dy W_down         da = pullback of combine at a, applied to dh         dx = da W_up
    dW_down[g] = Σ dyᵀ h        dW_up[g] = Σ daᵀ x        over the rows of group g

Nothing but the inputs is kept from the forward pass: a is computed again. In between, a and dh are float32 for all rows, and
dy, h and da are rounded to the rows' dtype, as tensor cores take them: R (6 N + 6 F + 2 D) bytes for bfloat16 rows, with N
columns of a. Sums are float32 and are rounded once.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K outer and inner dim of a matrix [N, K].
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from jaxmoe.kernels.grouped_matmul.combine import Combine
from jaxmoe.kernels.grouped_matmul.row_loops import owned_only
from jaxmoe.numerics import sum_dtype

# Columns of ones that biases' gradients are products with: one would do, but a kernel copies no fewer.
_ONES = 64


class Products(Protocol):
    """The three kinds of grouped products; sums are float32, and no row of another group, or of none, is a part of one.

    Rows that no group owns may hold anything in what goes in, and in what comes out by rows.
    """

    def by_rows(
        self, x_RK: jax.Array, w_GNK: jax.Array, b_GN: jax.Array | None, group_sizes_G: jax.Array, out_dtype: jnp.dtype
    ) -> jax.Array:
        """W[g(r)] x[r] + b[g(r)], [R, N]."""

    def by_columns(
        self, dy_RN: jax.Array, w_GNK: jax.Array, group_sizes_G: jax.Array, out_dtype: jnp.dtype
    ) -> jax.Array:
        """dy[r] W[g(r)], [R, K]."""

    def outer(self, dy_RN: jax.Array, x_RK: jax.Array, group_sizes_G: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """Σ dy[r]ᵀ x[r] over the rows of each group, [G, N, K]; zeros of one without rows."""


# Gradients of rows, matrices and biases of both products of an MLP; None for a bias that there is none of.
MlpGradients = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]


def product_gradients(
    products: Products, x_RK: jax.Array, w_GNK: jax.Array, group_sizes_G: jax.Array, dy_RN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of Σ dy · y in rows and matrices, with y[r] = W[g(r)] x[r]."""
    dy_RN = dy_RN.astype(x_RK.dtype)
    dx_RK = products.by_columns(dy_RN, w_GNK, group_sizes_G, x_RK.dtype)
    dw_GNK = products.outer(dy_RN, x_RK, group_sizes_G, w_GNK.dtype)
    return owned_only(dx_RK, group_sizes_G), dw_GNK


def mlp_gradients(
    products: Products,
    x_RD: jax.Array,
    w_up_pND: jax.Array,
    w_down_pDF: jax.Array,
    b_up_pN: jax.Array | None,
    b_down_pD: jax.Array | None,
    group_sizes_p: jax.Array,
    dy_RD: jax.Array,
    combine: Combine,
) -> MlpGradients:
    """Gradients of Σ dy · y in rows, matrices and biases; arguments as of `Kernels.expert_mlp`."""
    dtype, wide = x_RD.dtype, sum_dtype(x_RD.dtype)
    dy_RD = dy_RD.astype(dtype)
    h_RF, pullback = jax.vjp(combine, products.by_rows(x_RD, w_up_pND, b_up_pN, group_sizes_p, wide))
    (da_RN,) = pullback(products.by_columns(dy_RD, w_down_pDF, group_sizes_p, wide))
    h_RF, da_RN = h_RF.astype(dtype), da_RN.astype(dtype)

    def of_bias(b_pN: jax.Array | None, dy_RN: jax.Array) -> jax.Array | None:
        if b_pN is None:
            return None
        ones = jnp.ones((len(dy_RN), _ONES), dtype)
        return products.outer(dy_RN, ones, group_sizes_p, b_pN.dtype)[:, :, 0]

    return (
        owned_only(products.by_columns(da_RN, w_up_pND, group_sizes_p, dtype), group_sizes_p),
        products.outer(da_RN, x_RD, group_sizes_p, w_up_pND.dtype),
        products.outer(dy_RD, h_RF, group_sizes_p, w_down_pDF.dtype),
        of_bias(b_up_pN, da_RN),
        of_bias(b_down_pD, dy_RD),
    )
