"""The short convolution against NumPy's, whole and in parts, padded and not."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.layers.conv import causal_conv

pytestmark = pytest.mark.covering


def expected_conv(x_SA, weight_AW, bias_A):
    """numpy.convolve of every channel with its taps, newest first."""
    channels = [np.convolve(x, taps[::-1])[: len(x)] for x, taps in zip(x_SA.T, weight_AW, strict=True)]
    return np.stack(channels, axis=1) + bias_A


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_of_every_length_and_what_follows_them(taps, with_bias):
    """Rows from one token, shorter than the taps, to no padding; then two more parts behind each row's own end."""
    rng = np.random.default_rng(taps)
    A, lengths, more = 5, [1, 2, 3, 6, 9], (1, 4)
    weight, bias = rng.normal(size=(A, taps)), rng.normal(size=A) * with_bias
    rows = [rng.normal(size=(length + sum(more), A)) for length in lengths]
    prompt = rng.normal(size=(len(lengths), max(lengths), A)) * 100  # padding may be anything
    for padded, row, length in zip(prompt, rows, lengths, strict=True):
        padded[:length] = row[:length]

    def run(x_BSA, state, lengths):
        args = (jnp.asarray(x_BSA, jnp.float32), jnp.asarray(weight, jnp.float32))
        return causal_conv(*args, jnp.asarray(bias, jnp.float32) if with_bias else None, state, jnp.asarray(lengths))

    y, state = run(prompt, None, lengths)
    found = [list(np.asarray(y)[i, :length]) for i, length in enumerate(lengths)]
    assert state.shape == (len(lengths), taps - 1, A)
    for start, count in zip((0, more[0]), more, strict=True):
        part = [row[length + start : length + start + count] for row, length in zip(rows, lengths, strict=True)]
        y, state = run(np.stack(part), state, [count] * len(lengths))
        for one, new in zip(found, np.asarray(y), strict=True):
            one.extend(new)
    for one, row in zip(found, rows, strict=True):
        np.testing.assert_allclose(np.stack(one), expected_conv(row, weight, bias), rtol=1e-5, atol=1e-5)


def test_bfloat16_is_rounded_once():
    rng = np.random.default_rng(0)
    x, weight = (
        jnp.asarray(rng.normal(size=(1, 50, 8)), jnp.bfloat16),
        jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16),
    )
    y, state = causal_conv(x, weight, None, None, jnp.array([50]))
    exact = expected_conv(np.asarray(x[0], np.float64), np.asarray(weight, np.float64), 0)
    assert y.dtype == state.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y[0], np.float64), exact, rtol=2**-8, atol=1e-6)
