"""Residual streams of blocks of layers, which are read as a mean by attention over them: attention residuals of Kimi K3.

Letters here, beside the common ones of docs/concepts/letters.md: n streams.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import BlockResidualsConfig
from jaxmoe.layers.param import ParamFactory, ones
from jaxmoe.numerics import sum_dtype


class BlockResidualsHead(nnx.Module):
    """One stream from all: Σ_n softmax_n(w · norm(x_n)) x_n, computed in float32.

    w is a learned query, the same for all tokens, and the norm has a weight of its own.
    """

    def __init__(self, config: BlockResidualsConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        del config
        self.eps = eps
        self.norm = param((hidden_size,), init=ones)
        self.w = param((1, hidden_size))

    def __call__(self, x_BSnD: jax.Array) -> jax.Array:
        """Give [B, S, D]."""
        wide = sum_dtype(x_BSnD.dtype)
        x32, query_D = x_BSnD.astype(wide), self.norm[...].astype(wide) * self.w[...][0].astype(wide)
        # Sums of products and not a matrix product: float32 stays float32 on every device.
        scores_BSn = jnp.sum(x32 * query_D[None, None, None], axis=-1)
        scores_BSn = scores_BSn * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1) + self.eps)
        return jnp.sum(jax.nn.softmax(scores_BSn, axis=-1)[..., None] * x32, axis=2).astype(x_BSnD.dtype)


class BlockResiduals(BlockResidualsHead):
    """Streams on their way past one half of a layer, which reads the mean of `BlockResidualsHead`."""

    def __call__(self, x_BSnD: jax.Array) -> tuple[jax.Array, None]:  # type: ignore[override]
        """Give the input [B, S, D] of the half; what it writes needs no weights."""
        return super().__call__(x_BSnD), None
