"""Speculative greedy decoding: layers for multi-token prediction guess tokens, and one step of the model checks them all.

A step runs the last token and k drafts at the positions p .. p+k. The model's own greedy tokens g_1 .. g_{k+1} are what it
would have given one by one, as far as the drafts before them are the same: with a drafts right, g_1 .. g_{a+1} count. Rows
accept different numbers of them, and each goes on from its own position.

What a wrong draft has left in a cache by position is written over before it is seen, for the next step begins at or before
it. A recurrent state has no positions: `accepted` picks the one that the last right token has left.

The depths of multi-token prediction run over a window of 2k positions that ends with the step's: depth j needs the token j
places ahead, so what it kept for the last j - 1 positions was computed from drafts and is computed again. With more depths
than layers the last layer serves the others too, each depth with a cache of its own.

Letters here, beside the common ones of docs/concepts/letters.md: k drafts, M = k + 1 tokens of a step, W positions that
depths run over, H = k - 1 positions before the step's, Q known tokens and drafts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmoe.layers import MoEStats, accepted
from jaxmoe.mesh import batch_axes, named
from jaxmoe.models.decoder import Decoder
from jaxmoe.models.mtp import PredictionLayer
from jaxmoe.models.network import Cache
from jaxmoe.models.padding import prompt_positions


class SpeculationCache(NamedTuple):
    """The caches of the model's layers, and those of each depth of multi-token prediction."""

    main: Cache
    depths: Cache


class Progress(NamedTuple):
    """The state of every row between two steps.

    Attributes:
        position: int32 [B], where the newest token stands, which the model has not been run with.
        recent: int32 [B, k], the newest token and the k - 1 before it.
        drafts: int32 [B, k], guesses of the tokens behind it.
        hidden: [B, H, D], what the model gave at the positions before `position`.
    """

    position: jax.Array
    recent: jax.Array
    drafts: jax.Array
    hidden: jax.Array


class Checked(NamedTuple):
    """Tokens that a step has found.

    Attributes:
        tokens: int32 [B, M], greedy tokens of the model.
        counts: int32 [B], number of the first of them that count, at least 1.
    """

    tokens: jax.Array
    counts: jax.Array


class Depth(NamedTuple):
    """The tokens and states that the depths of multi-token prediction run over.

    Attributes:
        tokens: int32 [B, Q], tokens from position `first` on, with room for k drafts.
        first: int32 [B].
        newest: int32 [B], position of the last token that is known.
        hidden: [B, W, D], what the model gave at the positions that they run over.
        positions: int32 [B, W].
        mask: bool [B, W], whether a position has a token, and its row goes on.
    """

    tokens: jax.Array
    first: jax.Array
    newest: jax.Array
    hidden: jax.Array
    positions: jax.Array
    mask: jax.Array


def layers_by_depth(model: Decoder, num_drafts: int) -> list[PredictionLayer]:
    """The layer of each depth; the last one also serves the depths that have none of their own."""
    layers = model.prediction_layers
    return [layers[min(depth, len(layers) - 1)] for depth in range(num_drafts)]


def init_cache(model: Decoder, batch_size: int, max_length: int, num_drafts: int) -> SpeculationCache:
    """Empty caches for `batch_size` sequences of up to `max_length` tokens, drafts that turn out wrong among them."""
    main = model.empty_cache(model.layers[: model.config.num_main_layers], batch_size, max_length)
    return SpeculationCache(main, model.empty_cache(layers_by_depth(model, num_drafts), batch_size, max_length))


def begin(
    model: Decoder, tokens_BS: jax.Array, lengths_B: jax.Array, cache: SpeculationCache, num_drafts: int
) -> tuple[Checked, Progress, SpeculationCache, tuple[MoEStats, ...]]:
    """Run prompts, take each one's first token and guess those behind it.

    Args:
        model: model with layers for multi-token prediction.
        tokens_BS: int32, padded on the right.
        lengths_B: int32, tokens of each prompt; 0 for a padding row.
        cache: caches from `init_cache`.
        num_drafts: number k of tokens to guess.

    Returns:
        The first tokens, M of them as for `advance` of which one counts; the rows' state, the caches, and what each MoE
        layer did.
    """
    k, (B, S) = num_drafts, tokens_BS.shape
    positions_BS, mask_BS = prompt_positions(lengths_B, S)
    x_BSD, main, stats = model.hidden_and_stats(tokens_BS, positions_BS, mask_BS, cache.main)
    first_B1 = _greedy(model, _take(x_BSD, lengths_B[:, None] - 1))
    known = jnp.pad(tokens_BS, ((0, 0), (0, k + 1)))
    known = _put(known, lengths_B[:, None], first_B1)
    depth = Depth(known, jnp.zeros(B, jnp.int32), lengths_B, x_BSD, positions_BS, mask_BS)
    drafts_Bk, depths, own = _draft(model, depth, cache.depths, k, decode=False)
    back_k = jnp.arange(1 - k, 1, dtype=jnp.int32)[None]
    progress = Progress(
        position=lengths_B,
        recent=_take(known, lengths_B[:, None] + back_k),
        drafts=drafts_Bk,
        hidden=_take(x_BSD, lengths_B[:, None] + back_k[:, :-1]),
    )
    checked = Checked(jnp.pad(first_B1, ((0, 0), (0, k))), jnp.ones(B, jnp.int32))
    return checked, progress, SpeculationCache(main, depths), (*stats, *own)


def advance(
    model: Decoder, progress: Progress, active_B: jax.Array, cache: SpeculationCache
) -> tuple[Checked, Progress, SpeculationCache, tuple[MoEStats, ...]]:
    """Check the drafts of each row, keep those that are right, and guess again.

    Args:
        model: model with layers for multi-token prediction.
        progress: state from `begin` or from the last step.
        active_B: bool, False for rows that have ended: they stay where they are.
        cache: caches from there.

    Returns:
        As for `begin`.
    """
    k = progress.drafts.shape[1]
    position_B, M = progress.position, k + 1
    ahead_M = jnp.arange(M, dtype=jnp.int32)[None]
    run_BM = jnp.concatenate([progress.recent[:, -1:], progress.drafts], axis=1)
    mask_BM = jnp.broadcast_to(active_B[:, None], run_BM.shape)
    x_BMD, main, stats = model.hidden_and_stats(run_BM, position_B[:, None] + ahead_M, mask_BM, cache.main, decode=True)
    greedy_BM = _greedy(model, x_BMD)
    right_B = count_right(progress.drafts, greedy_BM)
    layers = model.layers[: model.config.num_main_layers]
    arrays = [layer.cache_arrays(1, 1) for layer in layers]
    main = tuple(accepted(array, one, right_B) for array, one in zip(arrays, main, strict=True))

    # From the position H before the step's on, as far as the step went.
    first_B = position_B - (k - 1)
    known = jnp.concatenate([progress.recent, greedy_BM, jnp.zeros_like(progress.drafts)], axis=1)
    hidden = jnp.concatenate([progress.hidden, x_BMD], axis=1)
    newest_B = position_B + right_B + 1
    start_B = jnp.maximum(first_B, 0)
    positions_BW = start_B[:, None] + jnp.arange(2 * k, dtype=jnp.int32)[None]
    mask_BW = active_B[:, None] & (positions_BW < newest_B[:, None])
    window = _take(hidden, positions_BW - first_B[:, None])
    depth = Depth(known, first_B, newest_B, window, positions_BW, mask_BW)
    drafts_Bk, depths, own = _draft(model, depth, cache.depths, k, decode=True)

    new_k = (right_B + 1)[:, None] + jnp.arange(k, dtype=jnp.int32)[None]
    following = Progress(newest_B, _take(known, new_k), drafts_Bk, _take(hidden, new_k[:, : k - 1]))
    following = jax.tree.map(
        lambda new, old: jnp.where(active_B.reshape(-1, *[1] * (new.ndim - 1)), new, old), following, progress
    )
    return Checked(greedy_BM, right_B + 1), following, SpeculationCache(main, depths), (*stats, *own)


def count_right(drafts_Bk: jax.Array, greedy_BM: jax.Array) -> jax.Array:
    """Count the drafts before the first that is not the model's own token, int32 [B]."""
    right_Bk = (drafts_Bk == greedy_BM[:, : drafts_Bk.shape[1]]).astype(jnp.int32)
    return jnp.sum(jnp.cumprod(right_Bk, axis=1), axis=1, dtype=jnp.int32)


def _draft(
    model: Decoder, depth: Depth, caches: Cache, num_drafts: int, *, decode: bool
) -> tuple[jax.Array, Cache, list[MoEStats]]:
    """Guess a token by each depth, int32 [B, k]; with the caches, and what each layer with routed experts did."""
    batch = batch_axes(model.mesh, len(depth.tokens))
    last_B1 = (depth.newest - 1)[:, None] - depth.positions[:, :1]
    tokens, hidden_BWD = depth.tokens, depth.hidden
    drafts, kept = [], []
    done: dict[int, MoEStats] = {}
    for index, layer in enumerate(layers_by_depth(model, num_drafts)):
        next_BW = _take(tokens, depth.positions + index + 1 - depth.first[:, None])
        normed_BWD, hidden_BWD, cache, stats = layer.predict(
            hidden_BWD, model.embedded(next_BW), depth.positions, depth.mask, caches[index], batch, decode=decode
        )
        drafts.append(_greedy(model, _take(normed_BWD, last_B1)))
        tokens = _put(tokens, (depth.newest + index + 1 - depth.first)[:, None], drafts[-1])
        kept.append(cache)
        if stats is not None:
            which = min(index, len(model.prediction_layers) - 1)
            done[which] = stats if which not in done else _both(done[which], stats)
    return jnp.concatenate(drafts, axis=1), tuple(kept), list(done.values())


def _both(stats: MoEStats, more: MoEStats) -> MoEStats:
    """The counts of two calls of one layer; all else is that of the first."""
    return stats._replace(expert_counts=stats.expert_counts + more.expert_counts)


def _greedy(model: Decoder, x_BSD: jax.Array) -> jax.Array:
    """The likeliest tokens, int32 [B, S], on every device; of equal ones the first."""
    tokens_BS = jnp.argmax(model.logits_of(x_BSD), axis=-1).astype(jnp.int32)
    return jax.lax.with_sharding_constraint(tokens_BS, named(model.mesh))


def _take(array: jax.Array, index_BS: jax.Array) -> jax.Array:
    """The entries of dim 1 at these indices, the nearest one where there is none."""
    index_BS = jnp.clip(index_BS, 0, array.shape[1] - 1)
    return jnp.take_along_axis(array, index_BS.reshape(*index_BS.shape, *[1] * (array.ndim - 2)), axis=1)


def _put(array_BQ: jax.Array, index_B1: jax.Array, value_B1: jax.Array) -> jax.Array:
    """The array with one entry of each row changed; no scatter, which is a serial loop on CPU."""
    return jnp.where(jnp.arange(array_BQ.shape[1], dtype=jnp.int32)[None] == index_B1, value_B1, array_BQ)
