"""Choosing the next token from logits: pure functions on float32 [B, V], V being the vocabulary.

Top-k and top-p both keep "the smallest set of likeliest tokens that weighs enough", with
a weight of one a token or of its probability. The set is ``{logits >= t}``, and `t` is found by
bisection over the float32 numbers: 32 passes over the logits, against a sort that was
measured ten times slower on CPU for a vocabulary of 150,000. All tokens tied with
the last one kept are kept, so the result never depends on the order of a sort.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxmoe.generation.params import SamplingParams

# Order-preserving int32 images of -inf and +inf; see `_ordinal_to_float`.
_LOWEST, _HIGHEST = -0x7F800001, 0x7F800000


class Controls(NamedTuple):
    """`SamplingParams` as traced numbers, scalars or one for each row, so that another temperature is no other program."""

    temperature: ArrayLike
    top_k: ArrayLike
    top_p: ArrayLike
    min_p: ArrayLike
    repetition_penalty: ArrayLike

    @classmethod
    def of(cls, params: SamplingParams) -> "Controls":
        """NumPy scalars, float32 and int32."""
        return cls(
            temperature=np.float32(params.temperature),
            top_k=np.int32(min(params.top_k or 0, np.iinfo(np.int32).max)),
            top_p=np.float32(params.top_p),
            min_p=np.float32(params.min_p),
            repetition_penalty=np.float32(params.repetition_penalty),
        )


class Mode(NamedTuple):
    """The parts of a sampler that act. They are static: work that is not asked for is not compiled in."""

    greedy: bool = True
    truncates: bool = False
    penalizes: bool = False

    @classmethod
    def of(cls, params: SamplingParams) -> "Mode":
        """The least work that `params` needs."""
        return cls(params.greedy, params.truncates and not params.greedy, params.penalizes)


def choose(
    logits_BV: jax.Array,
    seeds_B2: jax.Array,
    step: ArrayLike,
    seen_BV: jax.Array | None,
    controls: Controls,
    mode: Mode,
    bias_BV: jax.Array | None = None,
) -> jax.Array:
    """Choose the next token of every row.

    Args:
        logits_BV: logits, float32.
        seeds_B2: threefry keys of the rows, uint32; see `seed_words`.
        step: number of tokens generated before this one, an int32 scalar or one for each row.
        seen_BV: tokens in the prompt or generated, bool; read if ``mode.penalizes``.
        controls: settings, scalars or one for each row.
        mode: parts that act in some row.
        bias_BV: numbers that are added to the logits before all else, float32; None for none.

    Returns:
        int32 [B]. A row depends on its own logits, seed, settings and step only.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if bias_BV is not None:
        logits_BV = logits_BV + bias_BV
    if mode.penalizes:
        assert seen_BV is not None
        logits_BV = penalize_repetition(logits_BV, seen_BV, controls.repetition_penalty)
    likeliest_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if mode.greedy:
        return likeliest_B
    temperature_B = _by_row(controls.temperature, logits_BV)
    greedy_B = temperature_B == 0
    logits_BV = logits_BV / jnp.where(greedy_B, 1, temperature_B)[:, None]
    if mode.truncates:
        logits_BV = keep_top_k(logits_BV, controls.top_k)
        logits_BV = keep_top_p(logits_BV, controls.top_p)
    logits_BV = keep_min_p(logits_BV, controls.min_p)
    return jnp.where(greedy_B, likeliest_B, draw(logits_BV, seeds_B2, step))


def _by_row(value: ArrayLike, logits_BV: jax.Array) -> jax.Array:
    """A setting of every row, [B]."""
    return jnp.broadcast_to(jnp.asarray(value), logits_BV.shape[:1])


def penalize_repetition(logits_BV: jax.Array, seen_BV: jax.Array, penalty: ArrayLike) -> jax.Array:
    """Make tokens that were seen less likely (Keskar et al. 2019, arXiv:1909.05858, with signs minded).

    Args:
        logits_BV: logits, float32.
        seen_BV: tokens that were seen, bool.
        penalty: a scalar, or one for each row; above 1 discourages, below 1 encourages.
    """
    penalty_B1 = _by_row(penalty, logits_BV)[:, None]
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return jnp.where(seen_BV, penalized_BV, logits_BV)


def keep_top_k(logits_BV: jax.Array, k: ArrayLike) -> jax.Array:
    """Set all but the k largest logits to -inf (Fan et al. 2018, arXiv:1805.04833); k = 0 keeps all."""
    k_B = _by_row(k, logits_BV)
    target = jnp.where(k_B > 0, k_B, logits_BV.shape[-1]).astype(jnp.float32)
    # Counted in float32, which is exact up to 2**24 tokens.
    return _keep_heaviest(logits_BV, jnp.ones_like(logits_BV), target)


def keep_top_p(logits_BV: jax.Array, p: ArrayLike) -> jax.Array:
    """Keep the likeliest tokens up to probability p: nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751)."""
    # For p = 1 the tail would be cut where the sum rounds to one.
    p_B = _by_row(p, logits_BV)
    target = jnp.where(p_B < 1, p_B, jnp.inf)
    return _keep_heaviest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), target)


def keep_min_p(logits_BV: jax.Array, p: ArrayLike) -> jax.Array:
    """Keep tokens at least p times as likely as the likeliest: min-p sampling (Nguyen et al. 2024, arXiv:2407.01082)."""
    floor_B1 = jnp.max(logits_BV, axis=-1, keepdims=True) + jnp.log(_by_row(p, logits_BV))[:, None]
    # `+ log(1)` is exact, so p = 1 keeps the likeliest itself.
    return jnp.where(logits_BV < floor_B1, -jnp.inf, logits_BV)


def draw(logits_BV: jax.Array, seeds_B2: jax.Array, step: ArrayLike) -> jax.Array:
    """Draw a token a row from softmax(logits) with the noise of (row's seed, step) and nothing else.

    Threefry is named, not left to the default, so that a seed means the same text on every
    platform; its noise does not depend on how the array is sharded.
    """
    keys_B = jax.random.wrap_key_data(seeds_B2, impl="threefry2x32")
    keys_B = jax.vmap(jax.random.fold_in)(keys_B, _by_row(step, logits_BV))
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def seed_words(seeds: list[int]) -> np.ndarray:
    """The threefry key of each seed: uint32 [B, 2], high word first.

    Raises:
        ValueError: a seed is negative or needs more than 64 bits.
    """
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"a seed is an integer from 0 to 2**64 - 1; got {seed}")
    return np.array([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32).reshape(-1, 2)


def _keep_heaviest(logits_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Set to -inf what is below the largest t with ``sum(weights[logits >= t]) >= target``, if there is one."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # enough weight at `low`, too little at `high`
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the mean, without overflow
        kept_BV = logits_BV >= _ordinal_to_float(middle_B)[:, None]
        enough_B = jnp.sum(jnp.where(kept_BV, weights_BV, 0), axis=-1) >= target_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    rows = logits_BV.shape[0]
    bounds = (jnp.full(rows, _LOWEST, jnp.int32), jnp.full(rows, _HIGHEST, jnp.int32))
    low_B, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where(logits_BV >= _ordinal_to_float(low_B)[:, None], logits_BV, -jnp.inf)


def _ordinal_to_float(ordinal: jax.Array) -> jax.Array:
    """The float32 of an int32 under the map that keeps order: negative numbers count down from -1."""
    bits = jnp.where(ordinal < 0, ordinal ^ jnp.int32(0x7FFFFFFF), ordinal)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
