"""Multi-head latent attention: a cache of one latent and one rotated key for all heads; of all positions, or of chosen ones.

Letters here, beside the common ones of docs/concepts/letters.md: H heads, C positions of the cache, L width of the
latent, n dims of a head's query and key without a position, r dims with one, v dims of a head's value, Q width of the
queries' latent, k chosen positions. On a device H is its own; the latent is the same on all tp ranks.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmoe.config import IndexerConfig, MLAConfig
from jaxmoe.layers.attention import ChosenKeys, attend
from jaxmoe.layers.cache import CacheArray, cache_specs, write_prompts, write_token
from jaxmoe.layers.indexer import (
    choose_for_prompt,
    choose_for_token,
    indexer_keys,
    indexer_queries,
    indexer_weights,
    make_indexer_weights,
)
from jaxmoe.layers.key_pools import choose_pools_for_prompt, choose_pools_for_token, pool_keys
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.layers.weights import WeightSpecs, hold
from jaxmoe.mesh import TP
from jaxmoe.rotary.apply import apply_rope


class LatentCache(NamedTuple):
    """Latents and rotated keys of the positions seen so far; position i lies at index i.

    Also holds what describes the two: their shapes, or their partition specs.

    Attributes:
        latent: [B, C, L], normed and scaled; keys and values are made from it.
        rope_key: [B, C, r], rotated where the layer has positions; None where r is 0.
        index_key: [B, C, h] of the layer's indexer, or [B, C, 2h] with the gates of its pools; None where it has none.
    """

    latent: Any
    rope_key: Any
    index_key: Any = None


def attend_expanded(
    q_nope_BSHn: jax.Array,
    q_rope_BSHr: jax.Array,
    cache: LatentCache,
    w_kv_HaL: jax.Array,
    positions_BS: jax.Array,
    *,
    scale: float,
    chosen: ChosenKeys | None = None,
) -> jax.Array:
    """Attend with each head's keys and values made from the latents; returns [B, S, H, v].

    With c the latents and W_k, W_v a head's parts of `w_kv_HaL`, a = n + v rows:

        softmax(scale · (q_nope (W_k c)ᵀ + q_rope rope_keyᵀ) + causal mask) (W_v c)

    DeepSeek-V2 (arXiv:2405.04434), equations 9 to 19. Best for a whole prompt: a key costs less to make than all its
    queries' products with the wider latent would. `chosen` is that of `attend`.
    """
    n = q_nope_BSHn.shape[-1]
    kv_BHCa = jnp.einsum("bcl,hal->bhca", cache.latent, w_kv_HaL)
    q_BSHh, k_BHCh = q_nope_BSHn, kv_BHCa[..., :n]
    if cache.rope_key is not None:
        rope_key_BHCr = jnp.broadcast_to(cache.rope_key[:, None], (*kv_BHCa.shape[:3], cache.rope_key.shape[-1]))
        q_BSHh = jnp.concatenate([q_nope_BSHn, q_rope_BSHr], axis=-1)
        k_BHCh = jnp.concatenate([k_BHCh, rope_key_BHCr], axis=-1)
    return attend(
        q_BSHh,
        k_BHCh,
        kv_BHCa[..., n:],
        positions_BS,
        scale=scale,
        chosen=chosen,
    )


def attend_absorbed(
    q_nope_BSHn: jax.Array,
    q_rope_BSHr: jax.Array,
    cache: LatentCache,
    w_kv_HaL: jax.Array,
    positions_BS: jax.Array,
    *,
    scale: float,
    at_BSC: jax.Array | None = None,
    among_BSC: jax.Array | None = None,
) -> jax.Array:
    """Compute `attend_expanded` without any head's keys or values: W_k is applied to the query, W_v to the sum.

        W_v (softmax(scale · ((q_nope W_k) cᵀ + q_rope rope_keyᵀ) + causal mask) c)

    DeepSeek-V2 (arXiv:2405.04434), section 2.1.2. Best for a new token, which reads the cache and nothing wider.
    `at_BSC` are the positions of the cache's entries, where these are not their indices, and `among_BSC` tells which of
    them a token sees, where it does not see all.
    """
    n = q_nope_BSHn.shape[-1]
    q_latent_BSHL = jnp.einsum("bshn,hnl->bshl", q_nope_BSHn, w_kv_HaL[:, :n])
    scores_BHSC = jnp.einsum("bshl,bcl->bhsc", q_latent_BSHL, cache.latent, preferred_element_type=jnp.float32)
    if cache.rope_key is not None:
        scores_BHSC += jnp.einsum("bshr,bcr->bhsc", q_rope_BSHr, cache.rope_key, preferred_element_type=jnp.float32)
    if at_BSC is None:
        at_BSC = jnp.arange(scores_BHSC.shape[-1], dtype=jnp.int32)[None, None]
    seen_BSC = at_BSC <= positions_BS[..., None]
    if among_BSC is not None:
        seen_BSC &= among_BSC
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
    packable = ("w_q", "w_q_a", "w_q_b", "w_kv_a", "w_head_gate", "w_gate", "w_o")

    def __init__(self, config: MLAConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        # The latents' norms have an epsilon of their own, and the layer has no other norm.
        del eps
        H, L, n, r, v = config.num_heads, config.kv_rank, config.nope_head_dim, config.rope_head_dim, config.v_head_dim
        self.config, self.mesh, self.linear = config, param.mesh, param.linear
        if config.q_rank is None:
            self.w_q = param((H * (n + r), hidden_size), TP, None)
        else:
            self.w_q_a = param((config.q_rank, hidden_size))
            self.q_a_norm = param((config.q_rank,), init=ones)
            self.w_q_b = param((H * (n + r), config.q_rank), TP, None)
        self.w_kv_a = param((L + r, hidden_size))
        self.kv_a_norm = param((L,), init=ones)
        self.w_kv_b = param((H * (n + v), L), TP, None)
        if config.head_gates:
            self.w_head_gate = param((H, hidden_size), TP, None)
        if config.output_gate:
            self.w_gate = param((H * v, hidden_size), TP, None)
        self.w_o = param((hidden_size, H * v), None, TP)
        if config.bias:
            if config.q_rank is not None:
                self.b_q_a = param((config.q_rank,), init=zeros)
            self.b_kv_a = param((L + r,), init=zeros)
            self.b_o = param((hidden_size,), init=zeros)
        # None where positions are not chosen, or another layer has chosen them.
        self.indexer = None if config.indexer is None or config.indexer.reuses else config.indexer
        if self.indexer is not None:
            assert config.q_rank is not None
            hold(self, make_indexer_weights(self.indexer, hidden_size, config.q_rank, param=param))
        self.specs = WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> LatentCache:
        """The layer's cache, as a `LatentCache` of `CacheArray`."""
        config = self.config
        index_width = 0
        if self.indexer is not None:
            index_width = self.indexer.head_dim * (1 if self.indexer.pool_size is None else 2)
        widths = (config.kv_rank, config.rope_head_dim, index_width)
        return LatentCache(*(CacheArray((batch_size, max_length, width)) if width else None for width in widths))

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        cache: LatentCache | None,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
        chosen: jax.Array | None = None,
        lengths_B: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[Any, ...]:
        """Attend within a prompt, or from new tokens to the cache.

        Args:
            x_BSD: normed activations, the batch dim sharded over the axes `batch`.
            positions_BS: int32, position of each token; 0..S-1 unless `decode`, then from each row's own first one on.
            cache: cache that gets the new latents and rotated keys; None for none.
            batch: mesh axes of the batch dim.
            decode: whether the tokens attend to the cache at their positions and before.
            chosen: positions that the last layer with an indexer has chosen, as bool [B, S, C], or for one token in `decode`
                as int32 [B, 1, k], of which those behind the token are not seen; None where it chose all of them.
            lengths_B: int32, tokens of each row that count; it makes no difference, for none sees those behind it.
            adapter_ids_B: int32, adapter of each row, -1 for none; None for none at all.

        Returns:
            [B, S, D], and the cache with the new tokens in it; with an indexer the chosen positions as well.
        """
        del lengths_B
        weights, specs = self.specs.weights(self, adapter_ids_B, batch)
        cache_spec = None if cache is None else cache_specs(self.cache_arrays(1, 1), batch)
        y_BSD, cache, chosen = jax.shard_map(
            partial(self._local, decode=decode and cache is not None),
            mesh=self.mesh,
            in_specs=(specs, P(batch), P(batch), cache_spec, P(batch)),
            out_specs=(P(batch), cache_spec, P(batch)),
            check_vma=False,
        )(weights, x_BSD, positions_BS, cache, chosen)
        return (y_BSD, cache) if self.config.indexer is None else (y_BSD, cache, chosen)

    def _local(
        self,
        w: dict[str, Any],
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        cache: LatentCache | None,
        chosen: jax.Array | None,
        *,
        decode: bool,
    ) -> tuple[jax.Array, LatentCache | None, jax.Array | None]:
        """This device's part of `__call__`."""
        config = self.config
        latent_BSQ = self._query_latent(w, x_BSD)
        q_nope_BSHn, q_rope_BSHr = self._queries(w, x_BSD if latent_BSQ is None else latent_BSQ, positions_BS)
        new = self._latents(w, x_BSD, positions_BS)
        if cache is not None and decode:
            cache = jax.tree.map(partial(write_token, position_B=positions_BS[:, 0]), cache, new)
        elif cache is not None:
            cache, new = write_prompts(cache, new)
        seen = cache if decode and cache is not None else new
        if self.indexer is not None and latent_BSQ is not None:
            chosen = self._choose(self.indexer, w, x_BSD, latent_BSQ, positions_BS, seen, decode)
        w_kv_HaL = w["w_kv_b"].reshape(-1, config.nope_head_dim + config.v_head_dim, config.kv_rank)
        attend = attend_absorbed if decode else attend_expanded
        if chosen is not None and decode and x_BSD.shape[1] > 1:
            attend = partial(attend_absorbed, among_BSC=chosen)
        elif chosen is not None and decode:
            at_Bk1 = chosen[:, 0, :, None]
            seen = jax.tree.map(lambda array: jnp.take_along_axis(array, at_Bk1, axis=1, mode="clip"), seen)
            attend = partial(attend_absorbed, at_BSC=chosen)
        elif chosen is not None:
            attend = partial(attend_expanded, chosen=ChosenKeys.of(chosen))
        o_BSHv = attend(q_nope_BSHn, q_rope_BSHr, seen, w_kv_HaL, positions_BS, scale=config.scale)
        if config.head_gates:
            gates_BSH = jax.nn.sigmoid(self.linear(x_BSD, w["w_head_gate"]).astype(jnp.float32))
            o_BSHv = o_BSHv * gates_BSH.astype(o_BSHv.dtype)[..., None]
        o_BSA = o_BSHv.reshape(*o_BSHv.shape[:2], -1)
        if config.output_gate:
            o_BSA = o_BSA * jax.nn.sigmoid(self.linear(x_BSD, w["w_gate"]))
        y_BSD = self.linear(o_BSA, w["w_o"], jnp.float32)
        y_BSD = jax.lax.psum(y_BSD, TP).astype(x_BSD.dtype)
        return y_BSD + w["b_o"][None, None] if config.bias else y_BSD, cache, chosen

    def _choose(
        self,
        config: IndexerConfig,
        w: dict[str, Any],
        x_BSD: jax.Array,
        latent_BSQ: jax.Array,
        positions_BS: jax.Array,
        seen: LatentCache,
        decode: bool,
    ) -> jax.Array | None:
        """The positions to attend to among `seen`; None where there are no more than may be chosen."""
        weights, length, one = indexer_weights(w), seen.index_key.shape[1], decode and x_BSD.shape[1] == 1
        if length <= config.most_seen:
            return None
        queries = indexer_queries(weights, x_BSD, latent_BSQ, positions_BS, config)
        if config.pool_size is None:
            choose = choose_for_token if one else choose_for_prompt
            return choose(queries, seen.index_key, positions_BS, config.topk)
        k_BWh, size = pool_keys(seen.index_key, weights.b_index_gate), config.pool_size
        choose_pools = choose_pools_for_token if one else choose_pools_for_prompt
        return choose_pools(queries, k_BWh, positions_BS, size=size, count=config.topk // size, length=length)

    def _query_latent(self, w: dict[str, Any], x_BSD: jax.Array) -> jax.Array | None:
        """The normed latent [B, S, Q] that queries are made from; None where they are made from the activations."""
        config = self.config
        if config.q_rank is None:
            return None
        latent_BSQ = self.linear(x_BSD, w["w_q_a"])
        latent_BSQ = latent_BSQ + w["b_q_a"][None, None] if config.bias else latent_BSQ
        return rms_norm(latent_BSQ, w["q_a_norm"], config.latent_norm_eps)

    def _queries(
        self, w: dict[str, Any], source_BSQ: jax.Array, positions_BS: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """This rank's queries [B, S, H, n], and [B, S, H, r] rotated, from their latent or from the activations."""
        config = self.config
        q_BSA = self.linear(source_BSQ, w["w_q" if config.q_rank is None else "w_q_b"])
        q_BSHh = q_BSA.reshape(*q_BSA.shape[:2], -1, config.nope_head_dim + config.rope_head_dim)
        q_nope_BSHn, q_rope_BSHr = jnp.split(q_BSHh, [config.nope_head_dim], axis=-1)
        return q_nope_BSHn, self._turned(q_rope_BSHr, positions_BS)

    def _turned(self, y_BSHr: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """Rotated to their positions, or as they are where the layer has none."""
        return y_BSHr if self.config.rope is None else apply_rope(y_BSHr, positions_BS, self.config.rope)

    def _latents(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array) -> LatentCache:
        """The entries of the cache for these tokens."""
        config = self.config
        both_BSA = self.linear(x_BSD, w["w_kv_a"])
        both_BSA = both_BSA + w["b_kv_a"][None, None] if config.bias else both_BSA
        latent_BSL, rope_key_BSr = jnp.split(both_BSA, [config.kv_rank], axis=-1)
        # One key for all heads: as a single head to the rotation.
        rope_key = self._turned(rope_key_BSr[:, :, None], positions_BS)[:, :, 0] if config.rope_head_dim else None
        latent_BSL = rms_norm(latent_BSL, w["kv_a_norm"], config.latent_norm_eps)
        if config.latent_scale != 1:
            latent_BSL = latent_BSL * config.latent_scale
        if self.indexer is None:
            return LatentCache(latent_BSL, rope_key)
        return LatentCache(latent_BSL, rope_key, indexer_keys(indexer_weights(w), x_BSD, positions_BS, self.indexer))
