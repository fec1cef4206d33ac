"""Rotation of heads, as a product of complex numbers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.rotary import RopeConfig
from jaxmoe.rotary.apply import apply_rope

FREQUENCIES = (1.0, 0.3, 0.01)
WIDTH = 2 * len(FREQUENCIES) + 2  # the last two dims stay


def turned(x: np.ndarray, positions: np.ndarray, config: RopeConfig) -> np.ndarray:
    """Pair i at position m, as first + i · second, times scale · exp(i · m · frequency)."""
    r = len(config.frequencies)
    firsts, seconds = (slice(0, 2 * r, 2), slice(1, 2 * r, 2)) if config.interleaved else (slice(r), slice(r, 2 * r))
    factors = config.scale * np.exp(1j * positions[:, :, None, None] * np.array(config.frequencies))
    pairs = (x[..., firsts] + 1j * x[..., seconds]) * factors
    out = x.copy()
    out[..., firsts], out[..., seconds] = pairs.real, pairs.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers(interleaved):
    config = RopeConfig(frequencies=FREQUENCIES, scale=1.25, interleaved=interleaved)
    rng = np.random.default_rng(0)
    x, positions = rng.normal(size=(2, 4, 3, WIDTH)), np.array([[0, 1, 2, 3], [7, 100, 5, 5]])
    out = apply_rope(jnp.float32(x), jnp.asarray(positions), config)
    np.testing.assert_allclose(out, turned(x, positions, config), atol=1e-5)


def test_sequences_beyond_the_original_context_turn_by_the_long_frequencies():
    """A sequence is long from its token `long_above` on, counted from 0, and each row for itself."""
    long = RopeConfig(frequencies=(0.5, 0.2, 0.05), scale=2.0)
    config = RopeConfig(frequencies=FREQUENCIES, long=long, long_above=4)
    x = np.random.default_rng(1).normal(size=(3, 2, 1, WIDTH))
    positions = np.array([[2, 3], [3, 4], [4, 5]])
    out = apply_rope(jnp.float32(x), jnp.asarray(positions), config)
    short = turned(x[:1], positions[:1], dataclasses.replace(config, long=None))
    np.testing.assert_allclose(out, np.concatenate([short, turned(x[1:], positions[1:], long)]), atol=1e-5)
