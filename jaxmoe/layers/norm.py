"""RMS normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.layers.param import ParamFactory, ones


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight · x / sqrt(mean(x²) + eps) over the last dim, computed in float32.

    Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4. The normalised value is rounded
    to x's dtype before the weight is applied, as the checkpoints' reference does.
    """
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return weight * (x32 * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight, replicated over the mesh."""

    def __init__(self, size: int, eps: float, *, param: ParamFactory):
        self.weight = param((size,), init=ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise x [..., size]."""
        return rms_norm(x, self.weight[...], self.eps)
