"""Several residual streams that are read feature by feature, through a gate of low rank, as Qwen4-Exp has them.

Letters here, beside the common ones of docs/concepts/letters.md: n streams, r rank of the gate.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import GatedStreamsConfig
from jaxmoe.layers.norm import zero_centered_rms_norm
from jaxmoe.layers.param import ParamFactory, zeros


class GatedStreamsHead(nnx.Module):
    """One stream from all: the mean of sigmoid(W_up silu(W_down x̂ / n)) · x̂ over the streams.

    x̂ are the streams, each normalized on its own with a factor of 1 + weight for each of its features, side by side.
    """

    def __init__(self, config: GatedStreamsConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        self.config, self.eps = config, eps
        width = config.streams * hidden_size
        self.norm = param((width,), init=zeros)
        self.w_down = param((config.rank, width))
        self.w_up = param((width, config.rank))

    def __call__(self, x_BSnD: jax.Array) -> jax.Array:
        """Give [B, S, D]."""
        return self._read(self._normed(x_BSnD))

    def _normed(self, x_BSnD: jax.Array) -> jax.Array:
        return zero_centered_rms_norm(x_BSnD, self.norm[...].reshape(x_BSnD.shape[2:]), self.eps)

    def _read(self, x_BSnD: jax.Array) -> jax.Array:
        gate_BSr = _project(x_BSnD, self.w_down[...]) / self.config.streams
        gate_BSA = jnp.einsum("bsr,ar->bsa", jax.nn.silu(gate_BSr), self.w_up[...])
        return jnp.mean(jax.nn.sigmoid(gate_BSA).reshape(x_BSnD.shape) * x_BSnD, axis=2)


class GatedStreams(GatedStreamsHead):
    """Streams on their way past one half of a layer, f: x' = x + write · f(read), where read is that of `GatedStreamsHead`.

    write = 2 sigmoid(W_write x̂ / n), a number for each stream.
    """

    def __init__(self, config: GatedStreamsConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        super().__init__(config, hidden_size, eps, param=param)
        self.w_write = param((config.streams, config.streams * hidden_size))

    def __call__(self, x_BSnD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, None]]:  # type: ignore[override]
        """Give the input [B, S, D] of the half, and write [B, S, n] for `join_streams`."""
        x_BSnD = self._normed(x_BSnD)
        write_BSn = _project(x_BSnD, self.w_write[...]) / self.config.streams
        return self._read(x_BSnD), (2 * jax.nn.sigmoid(write_BSn), None)


def _project(x_BSnD: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.einsum("bsa,wa->bsw", x_BSnD.reshape(*x_BSnD.shape[:2], -1), w)
