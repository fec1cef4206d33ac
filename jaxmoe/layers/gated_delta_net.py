"""Gated delta net: a recurrent layer in attention's place, heads over tp and sequences over dp and ep.

Letters here, beside the common ones of docs/concepts/letters.md: G key heads, H value heads, k and v the widths of a
key and a value head, A channels of the convolution (the queries, keys and values of a device), W its taps, V = W - 1.
On a device G and H are its own.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import GatedDeltaNetConfig
from jaxmoe.layers.cache import CacheArray
from jaxmoe.layers.conv import causal_conv
from jaxmoe.layers.delta_rule import run_delta_rule, unit_heads
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones
from jaxmoe.layers.recurrent import RecurrentCache, RecurrentMixer
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP
from jaxmoe.numerics import ACTIVATIONS

_GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


class GatedDeltaNet(RecurrentMixer):
    """The gated delta rule behind a short convolution, its outputs normalized and gated (Yang et al. 2024, section 3.4).

    y = out(norm(o) · gate(z)), o = `chunked_delta_rule`(unit(q) / sqrt(k), unit(k), v) where q, k and v have gone
    through the convolution and an activation, with decay exp(-exp(a_log) softplus(a + dt_bias)) and strength
    sigmoid(b). Projections in the form `GatedDeltaNetConfig.fused_projections` says.
    """

    packable = ("w_in_qkvz", "w_in_ba", "w_in_q", "w_in_k", "w_in_v", "w_in_z", "w_in_b", "w_in_a", "w_out")

    def __init__(self, config: GatedDeltaNetConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        self.config, self.eps, self.mesh, self.linear = config, eps, param.mesh, param.linear
        H, keys = config.num_value_heads, config.num_key_heads * config.key_head_dim
        values = H * config.value_head_dim
        if config.fused_projections:
            self.w_in_qkvz = param((2 * keys + 2 * values, hidden_size), TP, None)
            self.w_in_ba = param((2 * H, hidden_size), TP, None)
        else:
            self.w_in_q = param((keys, hidden_size), TP, None)
            self.w_in_k = param((keys, hidden_size), TP, None)
            self.w_in_v = param((values, hidden_size), TP, None)
            self.w_in_z = param((values, hidden_size), TP, None)
            self.w_in_b = param((H, hidden_size), TP, None)
            self.w_in_a = param((H, hidden_size), TP, None)
        self.conv_q = param((keys, 1, config.conv_kernel_size), TP)
        self.conv_k = param((keys, 1, config.conv_kernel_size), TP)
        self.conv_v = param((values, 1, config.conv_kernel_size), TP)
        # Two exponentials deep in the decay of a whole sequence: not rounded with the other weights.
        self.a_log = param((H,), TP, init=_log_uniform, dtype=jnp.float32)
        self.dt_bias = param((H,), TP, init=ones, dtype=jnp.float32)
        self.out_norm = param((config.value_head_dim,), init=ones)
        self.w_out = param((hidden_size, values), None, TP)
        self.specs = WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> RecurrentCache:
        """The layer's cache, as a `RecurrentCache` of `CacheArray`; `max_length` makes no difference."""
        del max_length
        config = self.config
        channels = 2 * config.num_key_heads * config.key_head_dim + config.num_value_heads * config.value_head_dim
        state = (batch_size, config.num_value_heads, config.key_head_dim, config.value_head_dim)
        return RecurrentCache(
            conv=CacheArray((batch_size, config.conv_kernel_size - 1, channels), (None, TP), by_position=False),
            state=CacheArray(state, (TP,), "float32", by_position=False),
        )

    def _run(
        self, w: dict[str, Any], x_BSD: jax.Array, lengths_B: jax.Array, before: RecurrentCache | None
    ) -> tuple[jax.Array, RecurrentCache]:
        """See `RecurrentMixer`."""
        qkv_BSA, z_BSHv, b_BSH, a_BSH = self._project(w, x_BSD)
        taps = jnp.concatenate([w["conv_q"], w["conv_k"], w["conv_v"]])[:, 0]
        qkv_BSA, conv = causal_conv(qkv_BSA, taps, None, before.conv if before else None, lengths_B)
        q_BSHk, k_BSHk, v_BSHv = self._heads(ACTIVATIONS[self.config.activation](qkv_BSA))
        beta_BSH = jax.nn.sigmoid(b_BSH).astype(jnp.float32)
        rate_11H, bias_11H = -jnp.exp(w["a_log"])[None, None], w["dt_bias"][None, None]
        log_decay_BSH = rate_11H * jax.nn.softplus(a_BSH.astype(jnp.float32) + bias_11H)
        o_BSHv, state = run_delta_rule(
            q_BSHk, k_BSHk, v_BSHv, log_decay_BSH[..., None], beta_BSH, lengths_B, before.state if before else None
        )
        o_BSHv = rms_norm(o_BSHv.astype(x_BSD.dtype), w["out_norm"], self.eps)
        o_BSHv = (o_BSHv.astype(jnp.float32) * _GATES[self.config.gate](z_BSHv.astype(jnp.float32))).astype(x_BSD.dtype)
        return o_BSHv.reshape(*x_BSD.shape[:2], -1), RecurrentCache(conv, state)

    def _project(self, w: dict[str, Any], x_BSD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """This rank's queries, keys and values side by side [B, S, A], gates z [B, S, H, v], and b and a [B, S, H]."""
        config, (B, S, _) = self.config, x_BSD.shape

        def project(name: str) -> jax.Array:
            return self.linear(x_BSD, w[f"w_in_{name}"])

        def of_key_heads(y_BSA: jax.Array, *widths: int) -> list[jax.Array]:
            """Parts of those widths of every key head, each flat again."""
            y_BSGa = y_BSA.reshape(B, S, -1, sum(widths))
            ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
            return [part.reshape(B, S, -1) for part in jnp.split(y_BSGa, ends, axis=-1)]

        if config.fused_projections:
            k, rv = config.key_head_dim, config.value_heads_per_key_head * config.value_head_dim
            *qkv, z = of_key_heads(project("qkvz"), k, k, rv, rv)
            b, a = of_key_heads(project("ba"), *(config.value_heads_per_key_head,) * 2)
        else:
            *qkv, z, b, a = (project(name) for name in "qkvzba")
        return jnp.concatenate(qkv, axis=-1), z.reshape(B, S, -1, config.value_head_dim), b, a

    def _heads(self, qkv_BSA: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries and keys [B, S, H, k], of length 1/sqrt(k) and 1, and values [B, S, H, v]; all float32."""
        config, (B, S, _) = self.config, qkv_BSA.shape
        keys = config.num_key_heads * config.key_head_dim // jax.lax.axis_size(TP)
        q_BSA, k_BSA, v_BSA = jnp.split(qkv_BSA.astype(jnp.float32), [keys, 2 * keys], axis=-1)

        def unit(y_BSA: jax.Array) -> jax.Array:
            y_BSGk = unit_heads(y_BSA.reshape(B, S, -1, config.key_head_dim))
            return jnp.repeat(y_BSGk, config.value_heads_per_key_head, axis=2)

        q_BSHk = unit(q_BSA) * config.key_head_dim**-0.5
        return q_BSHk, unit(k_BSA), v_BSA.reshape(B, S, -1, config.value_head_dim)


def _log_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """ln of rates of decay between 0.01 and 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))
