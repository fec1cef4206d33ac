"""Normalization of activations."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.numerics import sum_dtype


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, float32_weight: bool = False) -> jax.Array:
    """Compute weight · x / sqrt(mean(x²) + eps) over the last dim, in float32 (float64 for float64).

    Zhang and Sennrich 2019 (arXiv:1910.07467), equation 4. The normalized value is rounded
    to x's dtype before the weight is applied, as the reference of most checkpoints does; with
    `float32_weight` after it alone.
    """
    wide = sum_dtype(x.dtype)
    x32 = x.astype(wide)
    weight = jax.lax.broadcast_to_rank(weight, x.ndim)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if float32_weight:
        return (weight.astype(wide) * (x32 * scale)).astype(x.dtype)
    return weight * (x32 * scale).astype(x.dtype)


def zero_centered_rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Compute `rms_norm` with 1 + weight, in float32: a weight near 0 keeps more bits than one near 1."""
    return rms_norm(x, 1 + weight.astype(jnp.float32), eps, float32_weight=True)


class RMSNorm(nnx.Module):
    """`rms_norm` with its weight, replicated over the mesh."""

    def __init__(self, size: int, eps: float, *, param: ParamFactory, float32_weight: bool = False):
        self.weight = param((size,), init=ones)
        self.eps = eps
        self.float32_weight = float32_weight

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x [..., size]."""
        return rms_norm(x, self.weight[...], self.eps, float32_weight=self.float32_weight)


class ZeroCenteredRMSNorm(nnx.Module):
    """`zero_centered_rms_norm` with its weight, replicated over the mesh."""

    def __init__(self, size: int, eps: float, *, param: ParamFactory):
        self.weight = param((size,), init=zeros)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x [..., size]."""
        return zero_centered_rms_norm(x, self.weight[...], self.eps)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array | None, eps: float) -> jax.Array:
    """Compute weight · (x - mean) / sqrt(variance + eps) + bias over the last dim, in float32.

    Ba et al. 2016 (arXiv:1607.06450).
    """
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    y = centered * jax.lax.rsqrt(jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + eps)
    y = y * jax.lax.broadcast_to_rank(weight.astype(jnp.float32), x.ndim)
    if bias is not None:
        y += jax.lax.broadcast_to_rank(bias.astype(jnp.float32), x.ndim)
    return y.astype(x.dtype)


class LayerNorm(nnx.Module):
    """`layer_norm` with its weight and bias, replicated over the mesh."""

    def __init__(self, size: int, eps: float, *, param: ParamFactory, bias: bool = True):
        self.weight = param((size,), init=ones)
        if bias:
            self.bias = param((size,), init=zeros)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x [..., size]."""
        return layer_norm(x, self.weight[...], self.bias[...] if hasattr(self, "bias") else None, self.eps)


# A kind of norm is a class and a line here; `DecoderConfig.norm` names it.
NORMS: dict[str, Callable[..., RMSNorm | ZeroCenteredRMSNorm | LayerNorm]] = {
    "rms": RMSNorm,
    "rms_float32": partial(RMSNorm, float32_weight=True),
    "rms_zero_centered": ZeroCenteredRMSNorm,
    "layer": LayerNorm,
    "layer_without_bias": partial(LayerNorm, bias=False),
}
