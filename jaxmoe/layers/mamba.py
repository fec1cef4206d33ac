"""Mamba: a selective scan behind a short convolution, channels over tp and sequences over dp and ep.

Letters here, beside the common ones of docs/concepts/letters.md: A channels, n numbers of a channel's state, r the rank
of the step sizes, W taps of the convolution, V = W - 1. On a device A is its own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import MambaConfig
from jaxmoe.layers.cache import CacheArray
from jaxmoe.layers.conv import causal_conv
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.layers.recurrent import RecurrentCache, RecurrentMixer, is_token
from jaxmoe.layers.selective_scan import selective_scan, selective_step
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP
from jaxmoe.numerics import ACTIVATIONS


class Mamba(RecurrentMixer):
    """A selective scan over convolved inputs, gated (Gu and Dao 2023, section 3.4).

    y = out((scan(u) + skip · u) · silu(z)), u = act(conv(x)), [x, z] = in(input); the scan's dt, b and c are norms of
    the parts of proj(u), and its step sizes softplus(W_dt dt + dt_bias). The norms are Jamba's (Lieber et al. 2024,
    arXiv:2403.19887, section 6.4).

    Every rank has its own channels; dt, b and c depend on all of them, so one psum brings their parts together.
    """

    packable = ("w_in_x", "w_in_z", "w_dt_b_c", "w_dt", "w_out")

    def __init__(self, config: MambaConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        self.config, self.eps, self.mesh, self.linear = config, eps, param.mesh, param.linear
        A, n, r = config.num_channels, config.state_size, config.dt_rank
        self.w_in_x = param((A, hidden_size), TP, None)
        self.w_in_z = param((A, hidden_size), TP, None)
        self.conv = param((A, 1, config.conv_kernel_size), TP)
        if config.conv_bias:
            self.b_conv = param((A,), TP, init=zeros)
        self.w_dt_b_c = param((r + 2 * n, A), None, TP)
        self.dt_norm = param((r,), init=ones)
        self.b_norm = param((n,), init=ones)
        self.c_norm = param((n,), init=ones)
        self.w_dt = param((A, r), TP, None)
        # Decays multiply up over a whole sequence: what makes them is not rounded with the other weights.
        self.dt_bias = param((A,), TP, init=_small_steps, dtype=jnp.float32)
        self.a_log = param((A, n), TP, None, init=_log_counting, dtype=jnp.float32)
        self.skip = param((A,), TP, init=ones, dtype=jnp.float32)
        self.w_out = param((hidden_size, A), None, TP)
        if config.bias:
            self.b_in_x = param((A,), TP, init=zeros)
            self.b_in_z = param((A,), TP, init=zeros)
            self.b_out = param((hidden_size,), init=zeros)
        self.specs = WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> RecurrentCache:
        """The layer's cache, as a `RecurrentCache` of `CacheArray`; `max_length` makes no difference."""
        del max_length
        config = self.config
        return RecurrentCache(
            conv=CacheArray(
                (batch_size, config.conv_kernel_size - 1, config.num_channels), (None, TP), by_position=False
            ),
            state=CacheArray((batch_size, config.num_channels, config.state_size), (TP,), "float32", by_position=False),
        )

    def _run(
        self, w: dict[str, Any], x_BSD: jax.Array, lengths_B: jax.Array, before: RecurrentCache | None
    ) -> tuple[jax.Array, RecurrentCache]:
        """See `RecurrentMixer`."""
        x_BSA, z_BSA = (self._project(w, x_BSD, name) for name in ("in_x", "in_z"))
        conv_before = before.conv if before else None
        x_BSA, conv = causal_conv(x_BSA, w["conv"][:, 0], w.get("b_conv"), conv_before, lengths_B)
        x_BSA = ACTIVATIONS[self.config.activation](x_BSA)
        dt_BSA, b_BSn, c_BSn = self._steps(w, x_BSA)
        # Padding neither fades the states nor adds to them.
        dt_BSA = jnp.where(is_token(x_BSD.shape[1], lengths_B), dt_BSA, 0)
        x32_BSA, rate_An = x_BSA.astype(jnp.float32), -jnp.exp(w["a_log"])
        if before is not None and x_BSD.shape[1] == 1:
            y_BA, state = selective_step(x32_BSA[:, 0], dt_BSA[:, 0], rate_An, b_BSn[:, 0], c_BSn[:, 0], before.state)
            y_BSA = y_BA[:, None]
        else:
            states_before = before.state if before else None
            y_BSA, state = selective_scan(x32_BSA, dt_BSA, rate_An, b_BSn, c_BSn, states_before)
        y_BSA = (y_BSA + w["skip"][None, None] * x32_BSA) * jax.nn.silu(z_BSA.astype(jnp.float32))
        return y_BSA.astype(x_BSD.dtype), RecurrentCache(conv, state)

    def _project(self, w: dict[str, Any], x_BSD: jax.Array, name: str) -> jax.Array:
        y_BSA = self.linear(x_BSD, w[f"w_{name}"])
        return y_BSA + w[f"b_{name}"][None, None] if self.config.bias else y_BSA

    def _steps(self, w: dict[str, Any], x_BSA: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The step sizes of this rank's channels [B, S, A], and b and c [B, S, n]; all float32."""
        n, r = self.config.state_size, self.config.dt_rank
        parts = self.linear(x_BSA, w["w_dt_b_c"], jnp.float32)
        split = jnp.split(jax.lax.psum(parts, TP).astype(x_BSA.dtype), [r, r + n], axis=-1)
        dt_BSr, b_BSn, c_BSn = (
            rms_norm(part, w[name], self.eps) for part, name in zip(split, ("dt_norm", "b_norm", "c_norm"), strict=True)
        )
        dt_BSA = self.linear(dt_BSr, w["w_dt"]).astype(jnp.float32) + w["dt_bias"][None, None]
        return jax.nn.softplus(dt_BSA), b_BSn.astype(jnp.float32), c_BSn.astype(jnp.float32)


def _small_steps(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Numbers that softplus makes step sizes of, log-uniform between 0.001 and 0.1."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(0.001), jnp.log(0.1)))
    return dt + jnp.log(-jnp.expm1(-dt))


def _log_counting(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """ln of the rates 1, 2, ..., n of every channel (section 3.6)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)
