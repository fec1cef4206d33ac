"""Multi-head latent attention: a cache of one latent and one rotated key for all heads.

Letters here, beside the common ones of docs/concepts/letters.md: H heads, C positions of the cache, L width of the
latent, n dims of a head's query and key without a position, r dims with one, v dims of a head's value. On a device H is
its own; the latent is the same on all tp ranks.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmoe.config import MLAConfig
from jaxmoe.layers.attention import attend
from jaxmoe.layers.cache import CacheArray, cache_specs, write_prompt, write_token
from jaxmoe.layers.linear import linear
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP
from jaxmoe.rotary.apply import apply_rope


class LatentCache(NamedTuple):
    """Latents and rotated keys of the positions seen so far; position i lies at index i.

    Also holds what describes the two: their shapes, or their partition specs.

    Attributes:
        latent: [B, C, L], normed; keys and values are made from it.
        rope_key: [B, C, r], rotated.
    """

    latent: Any
    rope_key: Any


def attend_expanded(
    q_nope_BSHn: jax.Array,
    q_rope_BSHr: jax.Array,
    cache: LatentCache,
    w_kv_HaL: jax.Array,
    positions_BS: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Attend with each head's keys and values made from the latents; returns [B, S, H, v].

    With c the latents and W_k, W_v a head's parts of `w_kv_HaL`, a = n + v rows:

        softmax(scale · (q_nope (W_k c)ᵀ + q_rope rope_keyᵀ) + causal mask) (W_v c)

    DeepSeek-V2 (arXiv:2405.04434), equations 9 to 19. Best for a whole prompt: a key costs less to make than all its
    queries' products with the wider latent would.
    """
    n = q_nope_BSHn.shape[-1]
    kv_BHCa = jnp.einsum("bcl,hal->bhca", cache.latent, w_kv_HaL)
    rope_key_BHCr = jnp.broadcast_to(cache.rope_key[:, None], (*kv_BHCa.shape[:3], cache.rope_key.shape[-1]))
    return attend(
        jnp.concatenate([q_nope_BSHn, q_rope_BSHr], axis=-1),
        jnp.concatenate([kv_BHCa[..., :n], rope_key_BHCr], axis=-1),
        kv_BHCa[..., n:],
        positions_BS,
        scale=scale,
    )


def attend_absorbed(
    q_nope_BSHn: jax.Array,
    q_rope_BSHr: jax.Array,
    cache: LatentCache,
    w_kv_HaL: jax.Array,
    positions_BS: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Compute `attend_expanded` without any head's keys or values: W_k is applied to the query, W_v to the sum.

        W_v (softmax(scale · ((q_nope W_k) cᵀ + q_rope rope_keyᵀ) + causal mask) c)

    DeepSeek-V2 (arXiv:2405.04434), section 2.1.2. Best for a new token, which reads the cache and nothing wider.
    """
    n = q_nope_BSHn.shape[-1]
    q_latent_BSHL = jnp.einsum("bshn,hnl->bshl", q_nope_BSHn, w_kv_HaL[:, :n])
    scores_BHSC = jnp.einsum("bshl,bcl->bhsc", q_latent_BSHL, cache.latent, preferred_element_type=jnp.float32)
    scores_BHSC += jnp.einsum("bshr,bcr->bhsc", q_rope_BSHr, cache.rope_key, preferred_element_type=jnp.float32)
    seen_BSC = jnp.arange(scores_BHSC.shape[-1], dtype=jnp.int32)[None, None] <= positions_BS[..., None]
    scores_BHSC = jnp.where(seen_BSC[:, None], scores_BHSC * scale, -jnp.inf)
    probabilities = jax.nn.softmax(scores_BHSC, axis=-1).astype(cache.latent.dtype)
    o_latent_BSHL = jnp.einsum("bhsc,bcl->bshl", probabilities, cache.latent)
    return jnp.einsum("bshl,hvl->bshv", o_latent_BSHL, w_kv_HaL[:, n:])


class LatentAttention(nnx.Module):
    """Multi-head latent attention; each tp rank has its own heads, and all of the latents and of the cache.

    A cache that is the same on all tp ranks is the price of keeping only L + r numbers a position, for all heads
    together: a rank's share of the heads' own keys and values, (H / tp) · (n + r + v), is more up to a wide tp.
    """

    # The keys' and values' own matrix is taken apart by heads.
    packable = ("w_q", "w_q_a", "w_q_b", "w_kv_a", "w_o")

    def __init__(self, config: MLAConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        # The latents' norms have an epsilon of their own, and the layer has no other norm.
        del eps
        H, L, n, r, v = config.num_heads, config.kv_rank, config.nope_head_dim, config.rope_head_dim, config.v_head_dim
        self.config, self.mesh = config, param.mesh
        if config.q_rank is None:
            self.w_q = param((H * (n + r), hidden_size), TP, None)
        else:
            self.w_q_a = param((config.q_rank, hidden_size))
            self.q_a_norm = param((config.q_rank,), init=ones)
            self.w_q_b = param((H * (n + r), config.q_rank), TP, None)
        self.w_kv_a = param((L + r, hidden_size))
        self.kv_a_norm = param((L,), init=ones)
        self.w_kv_b = param((H * (n + v), L), TP, None)
        self.w_o = param((hidden_size, H * v), None, TP)
        if config.bias:
            if config.q_rank is not None:
                self.b_q_a = param((config.q_rank,), init=zeros)
            self.b_kv_a = param((L + r,), init=zeros)
            self.b_o = param((hidden_size,), init=zeros)
        self.specs = WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> LatentCache:
        """The layer's cache, as a `LatentCache` of `CacheArray`."""
        latent, rope_key = (
            CacheArray((batch_size, max_length, width)) for width in (self.config.kv_rank, self.config.rope_head_dim)
        )
        return LatentCache(latent, rope_key)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        cache: LatentCache | None,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
    ) -> tuple[jax.Array, LatentCache | None]:
        """Attend within a prompt, or from one new token to the cache.

        Args:
            x_BSD: normed activations, the batch dim sharded over the axes `batch`.
            positions_BS: int32, position of each token; 0..S-1 unless `decode`.
            cache: cache that gets the new latents and rotated keys; None for none.
            batch: mesh axes of the batch dim.
            decode: whether S is 1 and the token attends to the cache at its position and before.

        Returns:
            [B, S, D], and the cache with the new tokens in it.
        """
        weights, specs = self.specs.weights(self)
        cache_spec = None if cache is None else cache_specs(self.cache_arrays(1, 1), batch)

        def local(
            w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array, cache: LatentCache | None
        ) -> tuple[jax.Array, LatentCache | None]:
            config = self.config
            q_nope_BSHn, q_rope_BSHr = self._queries(w, x_BSD, positions_BS)
            new = self._latents(w, x_BSD, positions_BS)
            if cache is not None and decode:
                position_B = positions_BS[:, 0]
                cache = LatentCache(*(write_token(old, one, position_B) for old, one in zip(cache, new, strict=True)))
            elif cache is not None:
                cache = LatentCache(*(write_prompt(old, one) for old, one in zip(cache, new, strict=True)))
            w_kv_HaL = w["w_kv_b"].reshape(-1, config.nope_head_dim + config.v_head_dim, config.kv_rank)
            seen, attend_to = (cache, attend_absorbed) if cache is not None and decode else (new, attend_expanded)
            o_BSHv = attend_to(q_nope_BSHn, q_rope_BSHr, seen, w_kv_HaL, positions_BS, scale=config.scale)
            o_BSA = o_BSHv.reshape(*o_BSHv.shape[:2], -1)
            y_BSD = linear(o_BSA, w["w_o"], jnp.float32)
            y_BSD = jax.lax.psum(y_BSD, TP).astype(x_BSD.dtype)
            return y_BSD + w["b_o"][None, None] if config.bias else y_BSD, cache

        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, P(batch), P(batch), cache_spec),
            out_specs=(P(batch), cache_spec),
            check_vma=False,
        )(weights, x_BSD, positions_BS, cache)

    def _queries(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
        """This rank's queries [B, S, H, n], and [B, S, H, r] rotated."""
        config = self.config
        if config.q_rank is None:
            q_BSA = linear(x_BSD, w["w_q"])
        else:
            latent_BSQ = linear(x_BSD, w["w_q_a"])
            latent_BSQ = latent_BSQ + w["b_q_a"][None, None] if config.bias else latent_BSQ
            latent_BSQ = rms_norm(latent_BSQ, w["q_a_norm"], config.latent_norm_eps)
            q_BSA = linear(latent_BSQ, w["w_q_b"])
        q_BSHh = q_BSA.reshape(*q_BSA.shape[:2], -1, config.nope_head_dim + config.rope_head_dim)
        q_nope_BSHn, q_rope_BSHr = jnp.split(q_BSHh, [config.nope_head_dim], axis=-1)
        return q_nope_BSHn, apply_rope(q_rope_BSHr, positions_BS, config.rope)

    def _latents(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array) -> LatentCache:
        """The entries of the cache for these tokens."""
        config = self.config
        both_BSA = linear(x_BSD, w["w_kv_a"])
        both_BSA = both_BSA + w["b_kv_a"][None, None] if config.bias else both_BSA
        latent_BSL, rope_key_BSr = jnp.split(both_BSA, [config.kv_rank], axis=-1)
        # One key for all heads: as a single head to the rotation.
        rope_key_BSr = apply_rope(rope_key_BSr[:, :, None], positions_BS, config.rope)[:, :, 0]
        return LatentCache(rms_norm(latent_BSL, w["kv_a_norm"], config.latent_norm_eps), rope_key_BSr)
