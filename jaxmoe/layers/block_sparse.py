"""Attention to the blocks of keys that a small indexer chooses, as MiniMax-M3 has it.

Letters here, beside the common ones of docs/concepts/letters.md and those of `jaxmoe.layers.attention`: i width of the
indexer's queries and key, b blocks of positions.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxmoe.config import BlockSparseAttentionConfig
from jaxmoe.layers.attention import Attention, ChosenKeys, KVCache
from jaxmoe.layers.cache import CacheArray
from jaxmoe.layers.norm import zero_centered_rms_norm
from jaxmoe.layers.param import ParamFactory, RowMap, zeros
from jaxmoe.layers.weights import WeightSpecs
from jaxmoe.mesh import TP
from jaxmoe.rotary.apply import apply_rope


class BlockSparseCache(NamedTuple):
    """Keys, values and the indexer's keys of the positions seen so far; position i lies at index i.

    Also holds what describes them: their shapes, or their partition specs.

    Attributes:
        k, v: fields of a `KVCache`.
        index_key: [B, C, i], normed and rotated; the same on all tp ranks.
    """

    k: Any
    v: Any
    index_key: Any


def choose_blocks(
    q_BsGi: jax.Array,
    positions_Bs: jax.Array,
    *,
    k_BCi: jax.Array,
    block_size: int,
    top_blocks: int,
    local_blocks: int,
) -> jax.Array:
    """Choose the blocks with the largest q · k of a key in them, those near the token before all others.

    A block after the token is never chosen; blocks that tie with the last one chosen are chosen too.

    Args:
        q_BsGi: the indexer's queries, for each key/value head.
        positions_Bs: int32, positions of the tokens.
        k_BCi: the indexer's keys, position i at index i; indices beyond a token's may hold anything finite.
        block_size, top_blocks, local_blocks: fields of `BlockSparseAttentionConfig`.

    Returns:
        bool [B, G, s, C], whether a key is in a chosen block.
    """
    C = k_BCi.shape[1]
    blocks = -(-C // block_size)
    index_11C = jnp.arange(C, dtype=jnp.int32)[None, None]
    scores_BGsC = jnp.einsum("bsgi,bci->bgsc", q_BsGi, k_BCi, preferred_element_type=jnp.float32)
    scores_BGsC = jnp.where((index_11C <= positions_Bs[..., None])[:, None], scores_BGsC, -jnp.inf)
    padded = jnp.pad(scores_BGsC, [(0, 0)] * 3 + [(0, blocks * block_size - C)], constant_values=-jnp.inf)
    scores_BGsb = jnp.max(padded.reshape(*padded.shape[:3], blocks, block_size), axis=-1)
    behind_Bsb = (positions_Bs // block_size)[..., None] - jnp.arange(blocks, dtype=jnp.int32)[None, None]
    near_Bsb = (behind_Bsb >= 0) & (behind_Bsb < local_blocks)
    scores_BGsb = jnp.where(near_Bsb[:, None], jnp.inf, scores_BGsb)
    least_BGs1 = jax.lax.top_k(scores_BGsb, min(top_blocks, blocks))[0][..., -1:]
    chosen_BGsb = (scores_BGsb >= least_BGs1) & (scores_BGsb > -jnp.inf)
    return jnp.repeat(chosen_BGsb, block_size, axis=-1, total_repeat_length=blocks * block_size)[..., :C]


class IndexedAttention(Attention):
    """`Attention` to keys that an indexer chooses: its queries and its one key are projections of x.

    They are normalized with a factor of 1 + weight and rotated like the heads. A layer of this kind makes the projection of
    the queries, and says in `_entries` and `_chosen` what is kept and what is seen.
    """

    packable = (*Attention.packable, "w_index_q", "w_index_k")

    def _make_indexer(self, w_index_q: nnx.Param, width: int, hidden_size: int, *, param: ParamFactory) -> None:
        self.w_index_q = w_index_q
        self.w_index_k = param((width, hidden_size))
        self.index_q_norm = param((width,), init=zeros)
        self.index_k_norm = param((width,), init=zeros)
        self.specs = WeightSpecs.of(self)

    def cache_arrays(self, batch_size: int, max_length: int) -> Any:
        """The layer's cache, as a `BlockSparseCache` of `CacheArray`."""
        index_key = CacheArray((batch_size, max_length, self.index_k_norm.shape[0]))
        return BlockSparseCache(*super().cache_arrays(batch_size, max_length), index_key)

    def _place(self, y_BSIi: jax.Array, norm_i: jax.Array, positions_BS: jax.Array) -> jax.Array:
        y_BSIi = zero_centered_rms_norm(y_BSIi, norm_i, self.eps)
        return y_BSIi if self.config.rope is None else apply_rope(y_BSIi, positions_BS, self.config.rope)


class BlockSparseAttention(IndexedAttention):
    """`Attention` in which each key/value head sees the blocks of keys that its indexer's head chooses.

    Products with keys outside of the chosen blocks are masked, not left out.
    """

    config: BlockSparseAttentionConfig

    def __init__(self, config: BlockSparseAttentionConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        super().__init__(config, hidden_size, eps, param=param)
        i, copies = config.index_head_dim, self.kv_heads // config.num_kv_heads
        rows = RowMap(config.num_kv_heads, copies=copies) if copies > 1 else None
        w_index_q = param((self.kv_heads * i, hidden_size), TP, None, rows=rows)
        self._make_indexer(w_index_q, i, hidden_size, param=param)

    def _entries(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array, new: KVCache) -> Any:
        """See `Attention`."""
        return BlockSparseCache(*new, self._index(w, "k", x_BSD, positions_BS)[:, :, 0])

    def _chosen(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array, seen: Any) -> ChosenKeys:
        """See `Attention`."""
        config = self.config
        choose = partial(
            choose_blocks,
            k_BCi=seen.index_key,
            block_size=config.block_size,
            top_blocks=config.top_blocks,
            local_blocks=config.local_blocks,
        )
        return ChosenKeys(self._index(w, "q", x_BSD, positions_BS), choose)

    def _index(self, w: dict[str, Any], name: str, x_BSD: jax.Array, positions_BS: jax.Array) -> jax.Array:
        """This rank's queries of the indexer [B, S, G, i], or its key [B, S, 1, i]."""
        y_BSA = self.linear(x_BSD, w[f"w_index_{name}"])
        y_BSGi = y_BSA.reshape(*y_BSA.shape[:2], -1, self.config.index_head_dim)
        return self._place(y_BSGi, w[f"index_{name}_norm"], positions_BS)
