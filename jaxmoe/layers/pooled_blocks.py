"""Attention to the blocks of keys whose mean an indexer chooses, as Qwen4-Exp has it.

Letters here, beside the common ones of docs/concepts/letters.md and those of `jaxmoe.layers.attention`: I heads of the
indexer, i width of one, b blocks of positions.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.config import PooledBlockAttentionConfig
from jaxmoe.layers.attention import ChosenKeys, KVCache
from jaxmoe.layers.block_sparse import BlockSparseCache, IndexedAttention
from jaxmoe.layers.indexer import largest
from jaxmoe.layers.param import ParamFactory
from jaxmoe.numerics import sum_dtype

# A choice is a matter of the last bits: no product is rounded to fewer than its operands have.
_HIGHEST = jax.lax.Precision.HIGHEST


def choose_whole_blocks(
    q_BsIi: jax.Array, positions_Bs: jax.Array, *, k_Bbi: jax.Array, block_size: int, top_blocks: int, count: int
) -> jax.Array:
    """Choose those with the largest Σ_I relu(q · k) of the blocks that end at a token or before it; of equal ones the first.

    The positions behind the last such block are chosen too.

    Args:
        q_BsIi: the indexer's queries.
        positions_Bs: int32, positions of the tokens.
        k_Bbi: keys of the whole blocks of the cache; those of blocks that end behind a token may hold anything finite.
        block_size, top_blocks: fields of `PooledBlockAttentionConfig`.
        count: number C of positions.

    Returns:
        bool [B, 1, s, C], whether a position is chosen, or behind the token.
    """
    blocks = k_Bbi.shape[1]
    whole_Bs1 = ((positions_Bs + 1) // block_size)[..., None]
    block_11C = (jnp.arange(count, dtype=jnp.int32) // block_size)[None, None]
    chosen_BsC = block_11C >= whole_Bs1
    if blocks:
        dtype = sum_dtype(q_BsIi.dtype)
        dots = jnp.einsum("bsni,bci->bsnc", q_BsIi, k_Bbi, precision=_HIGHEST, preferred_element_type=dtype)
        scores_Bsb = jnp.sum(jax.nn.relu(dots), axis=2)
        before_Bsb = jnp.arange(blocks, dtype=jnp.int32)[None, None] < whole_Bs1
        chosen_Bsb = before_Bsb & largest(jnp.where(before_Bsb, scores_Bsb, -jnp.inf), min(top_blocks, blocks))
        in_blocks = jnp.repeat(chosen_Bsb, block_size, axis=-1, total_repeat_length=blocks * block_size)
        chosen_BsC |= jnp.pad(in_blocks, [(0, 0), (0, 0), (0, count - blocks * block_size)])
    return chosen_BsC[:, None]


class PooledBlockAttention(IndexedAttention):
    """`Attention` in which a token sees the whole blocks of keys that an indexer chooses, and those behind the last of them.

    The key of a block is the mean of its positions' keys, normalized then, and rotated as the first of the positions is; the
    cache has the keys of single positions. Every tp rank has the whole indexer. Products with other keys are masked, not
    left out.
    """

    config: PooledBlockAttentionConfig

    def __init__(self, config: PooledBlockAttentionConfig, hidden_size: int, eps: float, *, param: ParamFactory):
        super().__init__(config, hidden_size, eps, param=param)
        i = config.index_head_dim
        self._make_indexer(param((config.index_heads * i, hidden_size)), i, hidden_size, param=param)

    def _entries(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array, new: KVCache) -> Any:
        """See `Attention`."""
        del positions_BS
        return BlockSparseCache(*new, self.linear(x_BSD, w["w_index_k"]))

    def _chosen(self, w: dict[str, Any], x_BSD: jax.Array, positions_BS: jax.Array, seen: Any) -> ChosenKeys:
        """See `Attention`."""
        config, count = self.config, seen.index_key.shape[1]
        q_BSA = self.linear(x_BSD, w["w_index_q"])
        q_BSIi = q_BSA.reshape(*q_BSA.shape[:2], config.index_heads, config.index_head_dim)
        q_BSIi = self._place(q_BSIi, w["index_q_norm"], positions_BS)
        choose = partial(
            choose_whole_blocks,
            k_Bbi=self._block_keys(w, seen.index_key),
            block_size=config.block_size,
            top_blocks=config.top_blocks,
            count=count,
        )
        return ChosenKeys(q_BSIi, choose)

    def _block_keys(self, w: dict[str, Any], k_BCi: jax.Array) -> jax.Array:
        """The keys [B, b, i] of the blocks that have all their positions."""
        size = self.config.block_size
        blocks = k_BCi.shape[1] // size
        k_Bbsi = k_BCi[:, : blocks * size].reshape(len(k_BCi), blocks, size, -1)
        k_Bbi = jnp.mean(k_Bbsi.astype(sum_dtype(k_BCi.dtype)), axis=2).astype(k_BCi.dtype)
        starts_Bb = jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32)[None] * size, k_Bbi.shape[:2])
        return self._place(k_Bbi[:, :, None], w["index_k_norm"], starts_Bb)[:, :, 0]
