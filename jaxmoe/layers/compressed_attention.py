"""Attention to a window of positions, and to compressed entries of all before: DeepSeek-V4.

Letters here, beside the common ones of docs/concepts/letters.md: H heads, h width of a head and of the one key, g groups of
heads, r width of what a group's output projection gives, Q width of the queries' latent, C keys, n slots of the window, W
entries, k chosen entries. On a device H and g are its own; keys and entries are the same on all tp ranks.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxmoe.config import CompressedAttentionConfig, IndexerConfig
from jaxmoe.layers.attention import ChosenKeys, attend
from jaxmoe.layers.cache import CacheArray, cache_specs, write_prompt
from jaxmoe.layers.compressor import Compressor, CompressorCache, CompressorWeights
from jaxmoe.layers.indexer import IndexerQueries, choose_for_prompt, choose_for_token, head_shares
from jaxmoe.layers.norm import rms_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.layers.ring import ring_of_prompt, ring_positions, write_ring
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP
from jaxmoe.numerics import sum_dtype
from jaxmoe.rotary.apply import rotate_tail, turn_back_tail

# Names of a compressor's parameters.
_COMPRESSOR = CompressorWeights("w_{}_kv", "w_{}_gate", "b_{}", "{}_norm")


class CompressedCache(NamedTuple):
    """The keys and entries that the layer keeps of the positions seen so far.

    Attributes:
        window: [B, n, h], keys of the last n positions.
        entries: entries that are keys too; None without compression.
        scored: entries that the indexer scores; None where it has none.
    """

    window: Any
    entries: CompressorCache | None = None
    scored: CompressorCache | None = None


class CompressedAttention(nnx.Module):
    """See `CompressedAttentionConfig`; each tp rank has its own groups of heads, and all of the keys and of the cache.

    With K the window's keys and the entries that count (all that are chosen), which are the values as well:

        o = softmax(q Kᵀ / sqrt(h), with a sink) K,    y = W_b (W_a,1 o_1 | ... | W_a,g o_g)

    where o is rotated back by its own position, since values were rotated too.
    """

    packable = ("w_q_a", "w_q_b", "w_kv", "w_o_b")

    def __init__(self, config: CompressedAttentionConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        H, h, Q = config.num_heads, config.head_dim, config.q_rank
        g, r = config.output_groups, config.output_rank
        self.config, self.eps, self.mesh, self.linear = config, eps, param.mesh, param.linear
        self.w_q_a = param((Q, hidden_size))
        self.q_a_norm = param((Q,), init=ones)
        self.w_q_b = param((H * h, Q), TP, None)
        self.w_kv = param((h, hidden_size))
        self.kv_norm = param((h,), init=ones)
        self.sinks = param((H,), TP, init=zeros, dtype=sum_dtype(param.dtype))
        self.w_o_a = param((g * r, H * h // g), TP, None)
        self.w_o_b = param((hidden_size, g * r), None, TP)
        for name, compressor in self._compressors().items():
            weights = compressor.make_weights(hidden_size, param=param)
            for template, weight in zip(_COMPRESSOR, weights, strict=True):
                setattr(self, template.format(name), weight)
        indexer = self._indexer
        if indexer is not None:
            self.w_index_q = param((indexer.num_heads * indexer.head_dim, Q))
            self.w_index_heads = param((indexer.num_heads, hidden_size), dtype=sum_dtype(param.dtype))
        self.specs = WeightSpecs.of(self)

    def _compressors(self) -> dict[str, Compressor]:
        """The layer's compressors by name: "entry" of the keys, and "index" of those that the indexer scores."""
        config, indexer = self.config, self._indexer
        found = {}
        if config.compression is not None:
            found["entry"] = Compressor(config.compression, config.head_dim, config.rope, self.eps)
            if indexer is not None:
                assert indexer.rope is not None
                found["index"] = Compressor(config.compression, indexer.head_dim, indexer.rope, self.eps)
        return found

    @property
    def _indexer(self) -> IndexerConfig | None:
        return None if self.config.compression is None else self.config.compression.indexer

    def cache_arrays(self, batch_size: int, max_length: int) -> CompressedCache:
        """The layer's cache, as a `CompressedCache` of `CacheArray`."""
        compressed = [one.cache_arrays(batch_size, max_length) for one in self._compressors().values()]
        return CompressedCache(CacheArray((batch_size, self.config.window, self.config.head_dim)), *compressed)

    def __call__(
        self,
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        cache: CompressedCache | None,
        batch: tuple[str, ...],
        *,
        decode: bool = False,
        lengths_B: jax.Array | None = None,
        adapter_ids_B: jax.Array | None = None,
    ) -> tuple[jax.Array, CompressedCache | None]:
        """Attend within a prompt, or from one new token to the cache.

        Args:
            x_BSD: normed activations, the batch dim sharded over the axes `batch`.
            positions_BS: int32, positions as `TokenMixer` has them: they tell a prompt's tokens from its padding.
            cache: cache before the tokens; None for none.
            batch: mesh axes of the batch dim.
            decode: whether S is 1 and the cache holds what the tokens before have left.
            lengths_B: None: this layer takes one token at a time.
            adapter_ids_B: int32, adapter of each row, -1 for none; None for none at all.

        Returns:
            [B, S, D], and the cache with the new tokens in it.
        """
        assert lengths_B is None, "compressed attention takes one token at a time"
        weights, specs = self.specs.weights(self, adapter_ids_B, batch)
        cache_spec = None if cache is None else cache_specs(self.cache_arrays(1, 1), batch)
        return jax.shard_map(
            partial(self._local, decode=decode),
            mesh=self.mesh,
            in_specs=(specs, P(batch), P(batch), cache_spec),
            out_specs=(P(batch), cache_spec),
            check_vma=False,
        )(weights, x_BSD, positions_BS, cache)

    def _local(
        self,
        w: dict[str, Any],
        x_BSD: jax.Array,
        positions_BS: jax.Array,
        cache: CompressedCache | None,
        *,
        decode: bool,
    ) -> tuple[jax.Array, CompressedCache | None]:
        """This device's part of `__call__`."""
        config, (B, S, _) = self.config, x_BSD.shape
        latent_BSQ = self._norm(self.linear(x_BSD, w["w_q_a"]), w["q_a_norm"])
        q_BSHh = self.linear(latent_BSQ, w["w_q_b"]).reshape(B, S, -1, config.head_dim)
        q_BSHh = rotate_tail(rms_norm(q_BSHh, jnp.ones((), q_BSHh.dtype), self.eps), positions_BS, config.rope)
        if decode:
            assert cache is not None
            k_BCh, seen_BSC, cache = self._see_cache(w, x_BSD, latent_BSQ, positions_BS, cache)
        else:
            k_BCh, seen_BSC, cache = self._see_prompt(w, x_BSD, latent_BSQ, positions_BS, cache)
        o_BSHh = attend(
            q_BSHh,
            k_BCh[:, None],
            k_BCh[:, None],
            # Which keys are seen is not a matter of their indices.
            jnp.full_like(positions_BS, k_BCh.shape[1] - 1),
            scale=config.head_dim**-0.5,
            sinks_H=w["sinks"],
            chosen=ChosenKeys.of(seen_BSC),
        )
        o_BSHh = turn_back_tail(o_BSHh, positions_BS, config.rope)
        groups = config.output_groups // jax.lax.axis_size(TP)
        w_grA = w["w_o_a"].reshape(groups, config.output_rank, -1)
        y_BSgr = jnp.einsum("bsga,gra->bsgr", o_BSHh.reshape(B, S, groups, -1), w_grA)
        y_BSD = self.linear(y_BSgr.reshape(B, S, -1), w["w_o_b"], jnp.float32)
        return jax.lax.psum(y_BSD, TP).astype(x_BSD.dtype), cache

    def _see_prompt(
        self,
        w: dict[str, Any],
        x_BSD: jax.Array,
        latent_BSQ: jax.Array,
        positions_BS: jax.Array,
        cache: CompressedCache | None,
    ) -> tuple[jax.Array, jax.Array, CompressedCache | None]:
        """The keys of a prompt [B, C, h], which of them each token sees, bool [B, S, C], and the cache."""
        lengths_B = jnp.max(positions_BS, axis=1) + 1
        new_BSh = self._keys(w, x_BSD, positions_BS)
        index_11S = jnp.arange(x_BSD.shape[1], dtype=jnp.int32)[None, None]
        at_BS1 = positions_BS[..., None]
        seen = [(index_11S <= at_BS1) & (index_11S > at_BS1 - self.config.window)]
        keys, caches = [new_BSh], []
        for name, compressor in self._compressors().items():
            before = None if cache is None else cache.entries if name == "entry" else cache.scored
            entries_BWh, after = compressor.of_prompt(_weights(w, name), x_BSD, lengths_B, before)
            caches.append(after)
            last_BS = compressor.last_entry(positions_BS)
            if name == "entry":
                keys.append(entries_BWh)
                seen.append(jnp.arange(entries_BWh.shape[1], dtype=jnp.int32)[None, None] <= last_BS[..., None])
            elif (topk := self._topk(entries_BWh)) is not None:
                queries = self._index_queries(w, x_BSD, latent_BSQ, positions_BS)
                seen[1] &= choose_for_prompt(queries, entries_BWh, last_BS, topk)
        if cache is not None:
            window = ring_of_prompt(new_BSh, lengths_B, self.config.window)
            cache = CompressedCache(write_prompt(cache.window, window), *caches)
        return jnp.concatenate(keys, axis=1), jnp.concatenate(seen, axis=-1), cache

    def _see_cache(
        self,
        w: dict[str, Any],
        x_B1D: jax.Array,
        latent_B1Q: jax.Array,
        positions_B1: jax.Array,
        cache: CompressedCache,
    ) -> tuple[jax.Array, jax.Array, CompressedCache]:
        """`_see_prompt` for one new token of each row."""
        position_B = positions_B1[:, 0]
        window = write_ring(cache.window, self._keys(w, x_B1D, positions_B1), position_B)
        seen_BC = ring_positions(position_B, self.config.window) >= 0
        held = [before for before in (cache.entries, cache.scored) if before is not None]
        caches = [
            compressor.of_token(_weights(w, name), x_B1D, position_B, before)
            for (name, compressor), before in zip(self._compressors().items(), held, strict=True)
        ]
        cache = CompressedCache(window, *caches)
        if cache.entries is None:
            return window, seen_BC[:, None], cache
        entries_BWh, last_B1 = cache.entries.entries, self._compressors()["entry"].last_entry(positions_B1)
        at_BW = jnp.arange(entries_BWh.shape[1], dtype=jnp.int32)[None]
        if cache.scored is not None and (topk := self._topk(cache.scored.entries)) is not None:
            queries = self._index_queries(w, x_B1D, latent_B1Q, positions_B1)
            at_BW = choose_for_token(queries, cache.scored.entries, last_B1, topk)[:, 0]
            entries_BWh = jnp.take_along_axis(entries_BWh, at_BW[..., None], axis=1)
        seen_BC = jnp.concatenate([seen_BC, at_BW <= last_B1], axis=1)
        return jnp.concatenate([window, entries_BWh], axis=1), seen_BC[:, None], cache

    def _keys(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array) -> jax.Array:
        k_BSh = self._norm(self.linear(x_BSD, w["w_kv"]), w["kv_norm"])
        return rotate_tail(k_BSh[:, :, None], positions_BS, self.config.rope)[:, :, 0]

    def _topk(self, entries_BWh: jax.Array) -> int | None:
        """Number of entries to choose; None where there are no more than that."""
        assert self._indexer is not None
        return None if entries_BWh.shape[1] <= self._indexer.topk else self._indexer.topk

    def _index_queries(
        self, w: dict[str, Any], x_BSD: jax.Array, latent_BSQ: jax.Array, positions_BS: jax.Array
    ) -> IndexerQueries:
        indexer = self._indexer
        assert indexer is not None
        assert indexer.rope is not None
        q_BSA = jnp.einsum("bsq,aq->bsa", latent_BSQ, w["w_index_q"])
        q_BSIh = q_BSA.reshape(*q_BSA.shape[:2], indexer.num_heads, indexer.head_dim)
        return IndexerQueries(rotate_tail(q_BSIh, positions_BS, indexer.rope), head_shares(x_BSD, w["w_index_heads"]))

    def _norm(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        return rms_norm(x, weight, self.eps, float32_weight=True)


def _weights(w: dict[str, Any], name: str) -> CompressorWeights:
    return CompressorWeights(*(w[template.format(name)] for template in _COMPRESSOR))
