"""The choice of the positions that a token attends to, by small heads of their own (DeepSeek sparse attention).

Letters here, beside the common ones of docs/concepts/letters.md: I heads of the indexer, h width of one, Q width of the
queries' latent, C positions to choose from, k positions that are chosen, r positions of a pool. Every tp rank has
the whole indexer, and so makes the same choice.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.config import IndexerConfig
from jaxmoe.layers.attention import by_query_blocks
from jaxmoe.layers.norm import layer_norm
from jaxmoe.layers.param import ParamFactory, ones, zeros
from jaxmoe.numerics import sum_dtype
from jaxmoe.rotary.apply import apply_rope

# A choice is a matter of the last bits: no product is rounded to fewer than its operands have.
_HIGHEST = jax.lax.Precision.HIGHEST


class IndexerWeights(NamedTuple):
    """The weights of a layer's indexer; also holds their parameters. The layer's parameters have these names.

    Attributes:
        w_index_q: [I h, Q], from the latent of the queries.
        w_index_k: [h, D].
        index_k_norm: [h], scale of the keys' norm.
        b_index_k_norm: [h], its bias.
        w_index_heads: [I, D], the projection to the heads' shares of the score; not rounded with the other weights.
        w_index_gate: [h, D], to the gates of the keys in a pool; None for positions that are chosen one by one.
        b_index_gate: [r, h], added to the gates; None likewise.
    """

    w_index_q: Any
    w_index_k: Any
    index_k_norm: Any
    b_index_k_norm: Any
    w_index_heads: Any
    w_index_gate: Any = None
    b_index_gate: Any = None


class IndexerQueries(NamedTuple):
    """The queries of some tokens.

    Attributes:
        q: [B, S, I, h], rotated.
        heads: [B, S, I], each head's share of the score.
    """

    q: jax.Array
    heads: jax.Array


def make_indexer_weights(
    config: IndexerConfig, hidden_size: int, q_rank: int, *, param: ParamFactory
) -> IndexerWeights:
    """Make the parameters of an indexer, each whole on every device."""
    heads, h, r = config.num_heads, config.head_dim, config.pool_size
    return IndexerWeights(
        w_index_q=param((heads * h, q_rank)),
        w_index_k=param((h, hidden_size)),
        index_k_norm=param((h,), init=ones),
        b_index_k_norm=param((h,), init=zeros),
        w_index_heads=param((heads, hidden_size), dtype=sum_dtype(param.dtype)),
        w_index_gate=None if r is None else param((h, hidden_size)),
        b_index_gate=None if r is None else param((r, h), init=zeros, dtype=sum_dtype(param.dtype)),
    )


def indexer_weights(weights: Mapping[str, jax.Array]) -> IndexerWeights:
    """Pick the indexer's weights out of a layer's."""
    return IndexerWeights(*(weights.get(name) for name in IndexerWeights._fields))


def indexer_keys(w: IndexerWeights, x_BSD: jax.Array, positions_BS: jax.Array, config: IndexerConfig) -> jax.Array:
    """One key for each token, [B, S, h], normed and rotated: what the cache holds.

    With pools the token's gates stand beside it, [B, S, 2h].
    """
    k_BSh = jnp.einsum("bsd,hd->bsh", x_BSD, w.w_index_k)
    k_BSh = layer_norm(k_BSh, w.index_k_norm, w.b_index_k_norm, config.key_norm_eps)
    k_BSh = _turned(k_BSh[:, :, None], positions_BS, config)[:, :, 0]
    if w.w_index_gate is None:
        return k_BSh
    return jnp.concatenate([k_BSh, jnp.einsum("bsd,hd->bsh", x_BSD, w.w_index_gate)], axis=-1)


def indexer_queries(
    w: IndexerWeights, x_BSD: jax.Array, latent_BSQ: jax.Array, positions_BS: jax.Array, config: IndexerConfig
) -> IndexerQueries:
    """The queries, from the latent that the attention's own are made from, and the heads' shares, from the activations."""
    q_BSA = jnp.einsum("bsq,aq->bsa", latent_BSQ, w.w_index_q)
    q_BSIh = q_BSA.reshape(*q_BSA.shape[:2], config.num_heads, config.head_dim)
    return IndexerQueries(_turned(q_BSIh, positions_BS, config), head_shares(x_BSD, w.w_index_heads))


def _turned(y_BSIh: jax.Array, positions_BS: jax.Array, config: IndexerConfig) -> jax.Array:
    return y_BSIh if config.rope is None else apply_rope(y_BSIh, positions_BS, config.rope)


def head_shares(x_BSD: jax.Array, w_ID: jax.Array) -> jax.Array:
    """Each head's share of the score, x Wᵀ / sqrt(I), [B, S, I] in the weight's dtype."""
    shares_BSI = jnp.einsum("bsd,id->bsi", x_BSD.astype(w_ID.dtype), w_ID, precision=_HIGHEST)
    return shares_BSI * w_ID.shape[0] ** -0.5


def index_scores(queries: IndexerQueries, k_BCh: jax.Array, last_BS: jax.Array) -> jax.Array:
    """Σ_i heads_i · relu(q_i kᵀ / sqrt(h)), [B, S, C] in the heads' dtype; -inf for indices after the last that counts.

    DeepSeek-V3.2 (arXiv:2512.02556), equation 1.
    """
    q_BSIh, heads_BSI = queries
    dtype = heads_BSI.dtype
    dots = jnp.einsum("bsih,bch->bsic", q_BSIh, k_BCh, precision=_HIGHEST, preferred_element_type=dtype)
    dots = jax.nn.relu(dots * q_BSIh.shape[-1] ** -0.5)
    scores_BSC = jnp.einsum("bsi,bsic->bsc", heads_BSI, dots, precision=_HIGHEST)
    seen_BSC = jnp.arange(k_BCh.shape[1], dtype=jnp.int32)[None, None] <= last_BS[..., None]
    return jnp.where(seen_BSC, scores_BSC, -jnp.inf)


def choose_for_prompt(queries: IndexerQueries, k_BCh: jax.Array, last_BS: jax.Array, topk: int) -> jax.Array:
    """The `topk` indices of the largest score for each token, as bool [B, S, C]; of equal ones the first.

    A token for which no more count may have some of the others among them as well.

    Args:
        queries: queries of the tokens.
        k_BCh: keys to choose from, in the order of their positions.
        last_BS: int32, last index that counts for each token; its own position, where each position has a key.
        topk: number of indices, at most C.
    """

    def block(q_BsIh: jax.Array, heads_BsI: jax.Array, last_Bs: jax.Array) -> jax.Array:
        return largest(index_scores(IndexerQueries(q_BsIh, heads_BsI), k_BCh, last_Bs), topk)

    return by_query_blocks(block, *queries, last_BS)


def choose_for_token(queries: IndexerQueries, k_BCh: jax.Array, last_B1: jax.Array, topk: int) -> jax.Array:
    """`choose_for_prompt` for one new token of each row, as int32 [B, 1, k]."""
    return jax.lax.top_k(index_scores(queries, k_BCh, last_B1), topk)[1].astype(jnp.int32)


def largest(scores_BSC: jax.Array, count: int) -> jax.Array:
    """Tell the `count` largest scores of the last dim, as bool of the same shape; of equal ones the first.

    A mask from indices would be a scatter, which is a serial loop on CPU.
    """
    least_BS1 = jax.lax.top_k(scores_BSC, count)[0][..., -1:]
    above_BSC, equal_BSC = scores_BSC > least_BS1, scores_BSC == least_BS1
    wanted_BS1 = count - jnp.sum(above_BSC, axis=-1, keepdims=True, dtype=jnp.int32)
    return above_BSC | (equal_BSC & (jnp.cumsum(equal_BSC, axis=-1, dtype=jnp.int32) <= wanted_BS1))
