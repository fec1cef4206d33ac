"""The choice of pools of positions, each by one key that is a learned sum of its positions' keys, as GLM-5.3 has it.

Letters here, beside the common ones of docs/concepts/letters.md and those of `jaxmoe.layers.indexer`: W whole pools, r
positions of one.
"""

import jax
import jax.numpy as jnp

from jaxmoe.layers.indexer import IndexerQueries, choose_for_prompt, choose_for_token


def pool_keys(packed_BCA: jax.Array, bias_rh: jax.Array) -> jax.Array:
    """One key [B, W, h] for each pool that has all its positions.

    It is the sum of their keys, weighted feature by feature: softmax over the positions of gate + bias.

    Args:
        packed_BCA: keys and, beside them, their gates, A = 2h; position i at index i.
        bias_rh: number that is added to the gates of each place in a pool.
    """
    size, width = bias_rh.shape
    pools = packed_BCA.shape[1] // size
    packed_BWrA = packed_BCA[:, : pools * size].reshape(len(packed_BCA), pools, size, 2 * width)
    k_BWrh, gate_BWrh = packed_BWrA[..., :width], packed_BWrA[..., width:]
    shares = jax.nn.softmax(gate_BWrh.astype(bias_rh.dtype) + bias_rh[None, None], axis=2)
    return jnp.sum(shares.astype(k_BWrh.dtype) * k_BWrh, axis=2)


def choose_pools_for_prompt(
    queries: IndexerQueries, k_BWh: jax.Array, positions_BS: jax.Array, *, size: int, count: int, length: int
) -> jax.Array:
    """The positions in the `count` best of the pools that end at a token or before it, and those behind the last such pool.

    Args:
        queries: queries of the tokens.
        k_BWh: keys of the whole pools; those of pools that end behind a token may hold anything finite.
        positions_BS: int32, positions of the tokens.
        size: number r of positions of a pool.
        count: number of pools to choose, at most W.
        length: number C of positions.

    Returns:
        bool [B, S, C], whether a position is chosen, or behind the token.
    """
    whole_BS = (positions_BS + 1) // size
    # Where fewer pools end, the others that come with them are behind the last of these, and seen or not for that.
    chosen_BSW = choose_for_prompt(queries, k_BWh, whole_BS - 1, count)
    covered = k_BWh.shape[1] * size
    in_pools_BSC = jnp.repeat(chosen_BSW, size, axis=-1, total_repeat_length=covered)
    in_pools_BSC = jnp.pad(in_pools_BSC, [(0, 0), (0, 0), (0, length - covered)])
    index_11C = jnp.arange(length, dtype=jnp.int32)[None, None]
    return in_pools_BSC | (index_11C >= (whole_BS * size)[..., None])


def choose_pools_for_token(
    queries: IndexerQueries, k_BWh: jax.Array, position_B1: jax.Array, *, size: int, count: int, length: int
) -> jax.Array:
    """`choose_pools_for_prompt` for one new token of each row, as int32 [B, 1, count · r + r - 1].

    A place that no position takes has `length`, which is behind every token.
    """
    whole_B1 = (position_B1 + 1) // size
    pool_B1k = choose_for_token(queries, k_BWh, whole_B1 - 1, count)
    at_B1kr = pool_B1k[..., None] * size + jnp.arange(size, dtype=jnp.int32)[None, None, None]
    # Not those that come with fewer pools than `count`: they would be seen twice, in the tail too.
    at_B1kr = jnp.where((pool_B1k < whole_B1[..., None])[..., None], at_B1kr, length)
    tail_B1r = (whole_B1 * size)[..., None] + jnp.arange(size - 1, dtype=jnp.int32)[None, None]
    tail_B1r = jnp.where(tail_B1r <= position_B1[..., None], tail_B1r, length)
    return jnp.concatenate([at_B1kr.reshape(*at_B1kr.shape[:2], -1), tail_B1r], axis=-1)
