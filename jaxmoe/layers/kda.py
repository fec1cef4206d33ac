"""Kimi delta attention: a recurrent layer in attention's place, heads over tp and sequences over dp and ep.

Letters here, beside the common ones of docs/concepts/letters.md: H heads, k the width of a head, A channels of all heads
(H · k), of which a convolution has those of queries, keys and values, V inputs that it keeps. On a device H and A are its
own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import KDAConfig
from jaxmoe.layers.cache import CacheArray
from jaxmoe.layers.conv import causal_conv
from jaxmoe.layers.delta_rule import run_delta_rule, unit_heads
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.layers.recurrent import RecurrentCache, RecurrentMixer
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP
from jaxmoe.numerics import ACTIVATIONS


class KimiDeltaAttention(RecurrentMixer):
    """The gated delta rule with a decay for every row of a memory, its outputs normalized and gated.

    y = out(norm(o) · sigmoid(g)), o = `chunked_delta_rule`(unit(q) / sqrt(k), unit(k), v) where q, k and v have gone
    through a convolution and an activation, with strength sigmoid(b) and the decays' logarithms

        -exp(a_log) softplus(f + dt_bias),    or, with a bound,    bound · sigmoid(exp(a_log) (f + dt_bias))

    f and g are projections of the activations, straight or by way of a latent. Kimi Team 2025 (arXiv:2510.26692),
    section 3.
    """

    packable = ("w_q", "w_k", "w_v", "w_b", "w_f", "w_f_a", "w_f_b", "w_g", "w_g_a", "w_g_b", "w_out")

    def __init__(self, config: KDAConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        self.config, self.eps, self.mesh, self.linear = config, eps, param.mesh, param.linear
        H, A = config.num_heads, config.num_heads * config.head_dim
        for part in "qkv":
            setattr(self, f"w_{part}", param((A, hidden_size), TP, None))
            # As precise as what it is computed in: it has few numbers.
            setattr(self, f"conv_{part}", param((A, 1, config.conv_kernel_size), TP, dtype=jnp.float32))
        for part, rank in (("f", config.decay_rank), ("g", config.gate_rank)):
            if rank is None:
                setattr(self, f"w_{part}", param((A, hidden_size), TP, None))
            else:
                setattr(self, f"w_{part}_a", param((rank, hidden_size)))
                setattr(self, f"w_{part}_b", param((A, rank), TP, None))
        self.w_b = param((H, hidden_size), TP, None)
        # Two exponentials deep in the decay of a whole sequence: not rounded with the other weights.
        if config.wide_rates:
            self.a_log = param((1, 1, H, 1), None, None, TP, None, init=_log_uniform, dtype=jnp.float32)
        else:
            self.a_log = param((H,), TP, init=_log_uniform, dtype=jnp.float32)
        if config.spare_rates:
            # Kept so that what is saved has them again; nothing is computed with them.
            self.a_log_spare = param((config.spare_rates,), init=zeros, dtype=jnp.float32)
        self.dt_bias = param((A,), TP, init=ones, dtype=jnp.float32)
        self.out_norm = param((config.head_dim,), init=ones)
        self.w_out = param((hidden_size, A), None, TP)
        self.specs = WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> RecurrentCache:
        """The layer's cache, as a `RecurrentCache` of `CacheArray`; `max_length` makes no difference."""
        del max_length
        H, k = self.config.num_heads, self.config.head_dim
        return RecurrentCache(
            conv=CacheArray((batch_size, self.config.conv_kernel_size - 1, 3 * H * k), (None, TP), by_position=False),
            state=CacheArray((batch_size, H, k, k), (TP,), "float32", by_position=False),
        )

    def _run(
        self, w: dict[str, Any], x_BSD: jax.Array, lengths_B: jax.Array, before: RecurrentCache | None
    ) -> tuple[jax.Array, RecurrentCache]:
        """See `RecurrentMixer`."""
        k = self.config.head_dim
        qkv_BSA = jnp.concatenate([self.linear(x_BSD, w[f"w_{part}"]) for part in "qkv"], axis=-1)
        taps_AW = jnp.concatenate([w[f"conv_{part}"] for part in "qkv"])[:, 0]
        qkv_BSA, conv = causal_conv(qkv_BSA, taps_AW, None, before.conv if before else None, lengths_B)
        qkv_BSA = ACTIVATIONS[self.config.activation](qkv_BSA).astype(jnp.float32)
        q_BSHk, k_BSHk, v_BSHk = (part.reshape(*x_BSD.shape[:2], -1, k) for part in jnp.split(qkv_BSA, 3, axis=-1))
        beta_BSH = jax.nn.sigmoid(self.linear(x_BSD, w["w_b"])).astype(jnp.float32)
        o_BSHk, state = run_delta_rule(
            unit_heads(q_BSHk) * k**-0.5,
            unit_heads(k_BSHk),
            v_BSHk,
            self._log_decays(w, x_BSD),
            beta_BSH,
            lengths_B,
            before.state if before else None,
        )
        o_BSHk = rms_norm(o_BSHk, w["out_norm"], self.eps, float32_weight=True)
        o_BSHk = o_BSHk * jax.nn.sigmoid(self._by_head(w, x_BSD, "g"))
        return o_BSHk.astype(x_BSD.dtype).reshape(*x_BSD.shape[:2], -1), RecurrentCache(conv, state)

    def _log_decays(self, w: dict[str, Any], x_BSD: jax.Array) -> jax.Array:
        """Logarithms of the decays [B, S, H, k]."""
        f_BSHk = self._by_head(w, x_BSD, "f") + w["dt_bias"].reshape(1, 1, -1, self.config.head_dim)
        rate_11H1 = jnp.exp(w["a_log"]).reshape(1, 1, -1, 1)
        if self.config.least_log_decay is not None:
            return self.config.least_log_decay * jax.nn.sigmoid(rate_11H1 * f_BSHk)
        return -rate_11H1 * jax.nn.softplus(f_BSHk)

    def _by_head(self, w: dict[str, Any], x_BSD: jax.Array, part: str) -> jax.Array:
        """A projection of this rank's heads, straight or by way of its latent: float32 [B, S, H, k]."""
        if f"w_{part}" in w:
            y_BSA = self.linear(x_BSD, w[f"w_{part}"])
        else:
            y_BSA = self.linear(self.linear(x_BSD, w[f"w_{part}_a"]), w[f"w_{part}_b"])
        return y_BSA.reshape(*x_BSD.shape[:2], -1, self.config.head_dim).astype(jnp.float32)


def _log_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """ln of rates of decay between 1 and 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
