"""The product of activations with a matrix, plain or packed."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul import QuantizedStack, grouped_matmul


def linear(x: jax.Array, weight: jax.Array | QuantizedStack, out_dtype: DTypeLike | None = None) -> jax.Array:
    """Compute x @ weightᵀ, [..., N]; a packed matrix is decoded as it is multiplied with.

    Args:
        x: [..., K].
        weight: [N, K], of x's dtype or packed.
        out_dtype: dtype of the sums and of the result; None for x's.
    """
    if not isinstance(weight, QuantizedStack):
        return jnp.einsum("...k,nk->...n", x, weight, preferred_element_type=out_dtype)
    rows = x.reshape(-1, x.shape[-1])
    stack = jax.tree.map(lambda array: array[None], weight)
    y = grouped_matmul(rows, stack, jnp.array([len(rows)], jnp.int32), out_dtype=out_dtype)
    return y.reshape(*x.shape[:-1], -1)
