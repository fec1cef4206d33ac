"""Hyper-connections: several residual streams in place of one.

Letters here, beside the common ones of docs/concepts/letters.md: n streams.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import AveragedStreamsConfig, HyperConnectionConfig
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.numerics import sum_dtype

_HIGHEST = jax.lax.Precision.HIGHEST


def doubly_stochastic(x: jax.Array, iterations: int, eps: float) -> jax.Array:
    """Bring positive matrices near sums of 1 over rows and over columns, dividing by them in turns, columns first.

    Sinkhorn and Knopp 1967. `x` has sums of 1 over its last dim to begin with; the last division is over the last but one.
    """
    x = x / (jnp.sum(x, axis=-2, keepdims=True) + eps)
    for _ in range(iterations - 1):
        x = x / (jnp.sum(x, axis=-1, keepdims=True) + eps)
        x = x / (jnp.sum(x, axis=-2, keepdims=True) + eps)
    return x


class HyperConnection(nnx.Module):
    """Streams on their way past one half of a layer, f: x' = mixᵀ x + write f(read · x).

    The weights are made from the streams, side by side and normalized, x̂: read = sigmoid(x̂ W_1 s_1 + b_1) + eps,
    write = 2 sigmoid(x̂ W_2 s_2 + b_2), and mix = `doubly_stochastic`(softmax(x̂ W_3 s_3 + b_3) + eps). All of it is float32.
    """

    def __init__(self, config: HyperConnectionConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        n, dtype = config.streams, sum_dtype(param.dtype)
        self.config, self.eps = config, eps
        self.w = param((n * (n + 2), n * hidden_size), dtype=dtype)
        self.bias = param((n * (n + 2),), init=zeros, dtype=dtype)
        self.scale = param((3,), init=ones, dtype=dtype)

    def __call__(self, x_BSnD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Give the input [B, S, D] of the half, and write [B, S, n] and mix [B, S, n, n] for `join_streams`."""
        n, config = self.config.streams, self.config
        weights = _project(x_BSnD, self.w[...], self.eps)
        scale, bias = self.scale[...], self.bias[...]
        read, write, mix = (
            part * scale[i] + bias[None, None, start:stop]
            for i, (part, (start, stop)) in enumerate(
                (weights[..., start:stop], (start, stop)) for start, stop in ((0, n), (n, 2 * n), (2 * n, None))
            )
        )
        mix = jax.nn.softmax(mix.reshape(*mix.shape[:2], n, n), axis=-1) + config.eps
        mix = doubly_stochastic(mix, config.iterations, config.eps)
        return _read(x_BSnD, jax.nn.sigmoid(read) + config.eps), (2 * jax.nn.sigmoid(write), mix)


class HyperHead(nnx.Module):
    """One stream from all, after the last layer: read · x, with the weights of `HyperConnection`."""

    def __init__(self, config: HyperConnectionConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        n, dtype = config.streams, sum_dtype(param.dtype)
        self.config, self.eps = config, eps
        self.w = param((n, n * hidden_size), dtype=dtype)
        self.bias = param((n,), init=zeros, dtype=dtype)
        self.scale = param((1,), init=ones, dtype=dtype)

    def __call__(self, x_BSnD: jax.Array) -> jax.Array:
        """Give [B, S, D]."""
        weights = _project(x_BSnD, self.w[...], self.eps)
        read = jax.nn.sigmoid(weights * self.scale[...][None, None] + self.bias[...][None, None])
        return _read(x_BSnD, read + self.config.eps)


class AveragingHead(nnx.Module):
    """One stream from all, after the last layer: their mean."""

    def __init__(self, config: AveragedStreamsConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        # It has no weights.
        del config, hidden_size, eps, param

    def __call__(self, x_BSnD: jax.Array) -> jax.Array:
        """Give [B, S, D]."""
        return jnp.mean(x_BSnD, axis=2)


def _project(x_BSnD: jax.Array, w: jax.Array, eps: float) -> jax.Array:
    x32 = x_BSnD.reshape(*x_BSnD.shape[:2], -1).astype(w.dtype)
    return jnp.einsum("bsa,wa->bsw", rms_norm(x32, jnp.ones((), w.dtype), eps), w, precision=_HIGHEST)


def _read(x_BSnD: jax.Array, read_BSn: jax.Array) -> jax.Array:
    return jnp.sum(read_BSn[..., None] * x_BSnD.astype(read_BSn.dtype), axis=2).astype(x_BSnD.dtype)
