"""What every scaling of rotary frequencies makes of them, by the laws that its paper gives."""

import math
from typing import Any

import numpy as np
import pytest

from jaxmoe.rotary import RopeConfig, read_rope

HEAD_DIM, THETA, CONTEXT, FACTOR = 32, 10000.0, 256, 8.0


def read(head_dim: int = HEAD_DIM, partial: bool = False, **rope: Any) -> RopeConfig:
    config = {
        "model_type": "mixtral",
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_theta": THETA, **rope},
    }
    return read_rope(config, head_dim=head_dim, default_theta=1.0, partial=partial)


def frequencies(rope: RopeConfig) -> np.ndarray:
    return np.array(rope.frequencies)


PLAIN = THETA ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
TURNS = CONTEXT * PLAIN / (2 * math.pi)
"""Rotations of each pair over the original context."""


def test_frequencies_are_powers_of_theta():
    rope = read()
    np.testing.assert_allclose(rope.frequencies, PLAIN, rtol=1e-6)
    assert rope.scale == 1.0


@pytest.mark.parametrize("part", [0.25, 0.5])
def test_a_part_of_a_head_has_the_frequencies_of_a_head_of_that_size(part):
    rope = read(partial=True, partial_rotary_factor=part)
    assert rope == read(head_dim=int(HEAD_DIM * part))
    assert rope.rotary_dim == HEAD_DIM * part


def test_linear_scaling_divides_positions():
    np.testing.assert_allclose(frequencies(read(rope_type="linear", factor=FACTOR)), PLAIN / FACTOR, rtol=1e-6)


def test_dynamic_scaling_stretches_the_slowest_pair_alone_by_alpha():
    ratio = PLAIN / frequencies(read(rope_type="dynamic", alpha=FACTOR))
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(FACTOR, rel=1e-5)
    assert (np.diff(ratio) > 0).all()


def test_llama3_keeps_fast_pairs_and_divides_slow_ones():
    low, high = 1.0, 4.0
    rope = read(
        rope_type="llama3",
        factor=FACTOR,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=CONTEXT,
    )
    ratio, turns = PLAIN / frequencies(rope), TURNS
    np.testing.assert_allclose(ratio[turns >= high], 1, rtol=1e-5)
    np.testing.assert_allclose(ratio[turns <= low], FACTOR, rtol=1e-5)
    between = (turns > low) & (turns < high)
    blend = (turns[between] - low) / (high - low)
    assert between.sum() >= 2
    np.testing.assert_allclose(1 / ratio[between], blend + (1 - blend) / FACTOR, rtol=1e-5)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_keeps_fast_pairs_divides_slow_ones_and_scales(truncate):
    fast, slow = 16.0, 2.0
    rope = read(
        rope_type="yarn",
        factor=FACTOR,
        beta_fast=fast,
        beta_slow=slow,
        truncate=truncate,
        original_max_position_embeddings=CONTEXT,
    )
    ratio = PLAIN / frequencies(rope)
    # The pairs, as fractions, that turn so often over the original context.
    first, last = (HEAD_DIM / 2 * math.log(CONTEXT / (turns * 2 * math.pi), THETA) for turns in (fast, slow))
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    blend = np.clip((np.arange(HEAD_DIM // 2) - first) / (last - first), 0, 1)
    assert {0.0, 1.0} < set(blend)
    np.testing.assert_allclose(1 / ratio, 1 - blend + blend / FACTOR, rtol=1e-5)
    assert rope.scale == pytest.approx(0.1 * math.log(FACTOR) + 1)


def test_yarn_scales_by_the_ratio_of_two_factors_where_there_are_two():
    rope = read(
        rope_type="yarn", factor=FACTOR, mscale=2.0, mscale_all_dim=0.5, original_max_position_embeddings=CONTEXT
    )
    assert rope.scale == pytest.approx((0.2 * math.log(FACTOR) + 1) / (0.05 * math.log(FACTOR) + 1))


def test_longrope_divides_each_pair_by_its_own_factor():
    short, long = [1 + 0.1 * i for i in range(HEAD_DIM // 2)], [2.0 + i for i in range(HEAD_DIM // 2)]
    rope = read(rope_type="longrope", short_factor=short, long_factor=long, original_max_position_embeddings=CONTEXT)
    np.testing.assert_allclose(frequencies(rope), PLAIN / short, rtol=1e-6)
    assert rope.long is not None
    np.testing.assert_allclose(frequencies(rope.long), PLAIN / long, rtol=1e-6)
    assert rope.long_above == CONTEXT
    assert rope.scale == pytest.approx(math.sqrt(1 + math.log(2048 / CONTEXT) / math.log(CONTEXT)))
