"""Mamba-2: a matrix state per head behind a short convolution, heads over tp and sequences over dp and ep.

Letters here, beside the common ones of docs/concepts/letters.md: G groups of heads, H heads, p numbers of a head's
input, n of its b and c, A the inputs of all heads, W taps of the convolution, V = W - 1. On a device G, H and A are its
own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import Mamba2Config
from jaxmoe.layers.cache import CacheArray
from jaxmoe.layers.conv import causal_conv
from jaxmoe.layers.param import ParamFactory, RowMap, ones, zeros
from jaxmoe.layers.recurrent import RecurrentCache, RecurrentMixer, is_token
from jaxmoe.layers.ssd import chunked_ssd, ssd_step
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP
from jaxmoe.numerics import ACTIVATIONS


class Mamba2(RecurrentMixer):
    """The state space dual layer, its outputs gated and normalized by groups (Dao and Gu 2024, section 7).

    y = out(norm((ssd(u, dt, b, c) + skip · u) · silu(z))), where u, b and c have gone through the convolution and an
    activation, and dt = max(softplus(dt + dt_bias), `Mamba2Config.min_step`).

    With fewer groups than tp ranks, each rank holds a copy of the b and c of the one its heads are in.
    """

    packable = ("w_in_z", "w_in_x", "w_in_b", "w_in_c", "w_in_dt", "w_out")

    def __init__(self, config: Mamba2Config, hidden_size: int, eps: float, *, param: ParamFactory):
        self.config, self.eps, self.mesh, self.linear = config, eps, param.mesh, param.linear
        self.tp = param.mesh.shape[TP]
        A, H, W = config.num_channels, config.num_heads, config.conv_kernel_size
        self.groups = max(config.num_groups, self.tp)
        rows, copies = None, self.groups // config.num_groups
        if copies > 1:
            rows = RowMap(config.num_groups, copies=copies)
        shared = self.groups * config.state_size
        for part, width, its_rows in (("z", A, None), ("x", A, None), ("b", shared, rows), ("c", shared, rows)):
            setattr(self, f"w_in_{part}", param((width, hidden_size), TP, None, rows=its_rows))
            if config.bias:
                setattr(self, f"b_in_{part}", param((width,), TP, init=zeros, rows=its_rows))
            if part != "z":
                setattr(self, f"conv_{part}", param((width, 1, W), TP, rows=its_rows))
            if part != "z" and config.conv_bias:
                setattr(self, f"b_conv_{part}", param((width,), TP, init=zeros, rows=its_rows))
        self.w_in_dt = param((H, hidden_size), TP, None)
        if config.bias:
            self.b_in_dt = param((H,), TP, init=zeros)
            self.b_out = param((hidden_size,), init=zeros)
        # Decays multiply up over a whole sequence: what makes them is not rounded with the other weights.
        self.a_log = param((H,), TP, init=_log_uniform, dtype=jnp.float32)
        self.dt_bias = param((H,), TP, init=ones, dtype=jnp.float32)
        self.skip = param((H,), TP, init=ones, dtype=jnp.float32)
        self.out_norm = param((A,), TP, init=ones)
        self.w_out = param((hidden_size, A), None, TP)
        self.specs = WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> RecurrentCache:
        """The layer's cache, as a `RecurrentCache` of `CacheArray`; `max_length` makes no difference."""
        del max_length
        config = self.config
        channels = config.num_channels + 2 * self.groups * config.state_size
        state = (batch_size, config.num_heads, config.head_dim, config.state_size)
        return RecurrentCache(
            conv=CacheArray((batch_size, config.conv_kernel_size - 1, channels), (None, TP), by_position=False),
            state=CacheArray(state, (TP,), "float32", by_position=False),
        )

    def _run(
        self, w: dict[str, Any], x_BSD: jax.Array, lengths_B: jax.Array, before: RecurrentCache | None
    ) -> tuple[jax.Array, RecurrentCache]:
        """See `RecurrentMixer`."""
        z_BSA, dt_BSH = self._project(w, x_BSD, "z"), self._project(w, x_BSD, "dt")
        x_BSHp, b_BSGn, c_BSGn, conv = self._convolved(w, x_BSD, before.conv if before else None, lengths_B)
        dt_BSH = jax.nn.softplus(dt_BSH.astype(jnp.float32) + w["dt_bias"][None, None])
        # Padding neither fades the states nor adds to them.
        dt_BSH = jnp.where(is_token(x_BSD.shape[1], lengths_B), jnp.maximum(dt_BSH, self.config.min_step), 0)
        rate_H = -jnp.exp(w["a_log"])
        if before is not None and x_BSD.shape[1] == 1:
            y_BHp, state = ssd_step(x_BSHp[:, 0], dt_BSH[:, 0], rate_H, b_BSGn[:, 0], c_BSGn[:, 0], before.state)
            y_BSHp = y_BHp[:, None]
        else:
            states_before = before.state if before else None
            y_BSHp, state = chunked_ssd(x_BSHp, dt_BSH, rate_H, b_BSGn, c_BSGn, states_before)
        y_BSHp = y_BSHp + w["skip"][None, None, :, None] * x_BSHp
        y_BSA = y_BSHp.reshape(z_BSA.shape) * jax.nn.silu(z_BSA.astype(jnp.float32))
        y_BSA = (self._normed(y_BSA) * w["out_norm"].astype(jnp.float32)[None, None]).astype(x_BSD.dtype)
        return y_BSA, RecurrentCache(conv, state)

    def _project(self, w: dict[str, Any], x_BSD: jax.Array, part: str) -> jax.Array:
        y_BSA = self.linear(x_BSD, w[f"w_in_{part}"])
        return y_BSA + w[f"b_in_{part}"][None, None] if self.config.bias else y_BSA

    def _convolved(
        self, w: dict[str, Any], x_BSD: jax.Array, before: jax.Array | None, lengths_B: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """This rank's x [B, S, H, p], b and c [B, S, G, n], all float32, and the inputs that the convolution keeps."""
        config, (B, S, _) = self.config, x_BSD.shape
        inputs = jnp.concatenate([self._project(w, x_BSD, part) for part in "xbc"], axis=-1)
        taps = jnp.concatenate([w[f"conv_{part}"] for part in "xbc"])[:, 0]
        bias = jnp.concatenate([w[f"b_conv_{part}"] for part in "xbc"]) if config.conv_bias else None
        outputs, kept = causal_conv(inputs, taps, bias, before, lengths_B)
        outputs = ACTIVATIONS[config.activation](outputs).astype(jnp.float32)
        A, shared = config.num_channels // self.tp, self.groups * config.state_size // self.tp
        x_BSA, b_BSi, c_BSi = jnp.split(outputs, [A, A + shared], axis=-1)
        b_BSGn, c_BSGn = (y_BSi.reshape(B, S, -1, config.state_size) for y_BSi in (b_BSi, c_BSi))
        return x_BSA.reshape(B, S, -1, config.head_dim), b_BSGn, c_BSGn, kept

    def _normed(self, y_BSA: jax.Array) -> jax.Array:
        """y / rms(y) over each group's heads, which may be on several ranks."""
        G = self.groups // self.tp
        y_BSGa = y_BSA.reshape(*y_BSA.shape[:2], G, -1)
        squares_BSG1 = jnp.mean(jnp.square(y_BSGa), axis=-1, keepdims=True)
        sharing = self.groups // self.config.num_groups
        if sharing > 1:
            every_rank = jax.lax.all_gather(squares_BSG1, TP)
            own = jax.lax.axis_index(TP) // sharing
            squares_BSG1 = jnp.mean(every_rank.reshape(-1, sharing, *squares_BSG1.shape)[own], axis=0)
        return (y_BSGa * jax.lax.rsqrt(squares_BSG1 + self.eps)).reshape(y_BSA.shape)


def _log_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """ln of rates of decay between 1 and 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
