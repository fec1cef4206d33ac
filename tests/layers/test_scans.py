"""The parallel forms of Mamba's recurrences are the recurrences, token by token in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxmoe.layers.selective_scan import selective_scan, selective_step
from jaxmoe.layers.ssd import chunked_ssd, ssd_step
from tests.support.runs import examples

TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}

selective_scan = jax.jit(selective_scan, static_argnames="chunk_size")
chunked_ssd = jax.jit(chunked_ssd, static_argnames="chunk_size")


def float32(*arrays):
    return [jnp.asarray(array, jnp.float32) for array in arrays]


def expected_selective(x, dt, rate, b, c, state):
    """One channel of one token after the other."""
    y, state = np.zeros(x.shape), state.copy()
    for row, t, a in np.ndindex(*x.shape):
        state[row, a] = np.exp(dt[row, t, a] * rate[a]) * state[row, a] + dt[row, t, a] * x[row, t, a] * b[row, t]
        y[row, t, a] = state[row, a] @ c[row, t]
    return y, state


def expected_ssd(x, dt, rate, b, c, state):
    """One head of one token after the other."""
    y, state = np.zeros(x.shape), state.copy()
    for row, t, h in np.ndindex(*x.shape[:3]):
        group = h // (x.shape[2] // b.shape[2])
        added = dt[row, t, h] * np.outer(x[row, t, h], b[row, t, group])
        state[row, h] = np.exp(dt[row, t, h] * rate[h]) * state[row, h] + added
        y[row, t, h] = state[row, h] @ c[row, t, group]
    return y, state


@settings(max_examples=examples(2, 6))
@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 3), S=st.integers(1, 11), chunk=st.integers(1, 12), seed=st.integers(0, 99)
)
@example(sizes=(2, 3, 4), S=35, chunk=16, seed=0)
def test_selective_scan(sizes, S, chunk, seed):
    (B, A, n), rng = sizes, np.random.default_rng(seed)
    x, dt = rng.normal(size=(B, S, A)), rng.exponential(0.5, (B, S, A))
    dt[rng.random(dt.shape) < 0.2] = 0
    b, c = rng.normal(size=(2, B, S, n))
    rate, state = -rng.exponential(1.0, (A, n)), rng.normal(size=(B, A, n))
    y, after = expected_selective(x, dt, rate, b, c, state)
    found, found_after = selective_scan(*float32(x, dt, rate, b, c, state), chunk_size=chunk)
    np.testing.assert_allclose(found, y, **TOLERANCE)
    np.testing.assert_allclose(found_after, after, **TOLERANCE)
    args = float32(x[:, 0], dt[:, 0], rate, b[:, 0], c[:, 0], state)
    np.testing.assert_allclose(selective_step(*args)[0], y[:, 0], **TOLERANCE)
    from_zeros = selective_scan(*float32(x, dt, rate, b, c), chunk_size=chunk)
    for one, other in zip(from_zeros, expected_selective(x, dt, rate, b, c, 0 * state), strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


@settings(max_examples=examples(2, 6))
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 5), S=st.integers(1, 11), chunk=st.integers(1, 12), seed=st.integers(0, 99)
)
@example(sizes=(2, 2, 3, 4, 5), S=35, chunk=16, seed=0)
def test_chunked_ssd(sizes, S, chunk, seed):
    (B, G, heads, p, n), rng = sizes, np.random.default_rng(seed)
    H = G * heads
    x, dt = rng.normal(size=(B, S, H, p)), rng.exponential(0.5, (B, S, H))
    dt[rng.random(dt.shape) < 0.2] = 0
    b, c = rng.normal(size=(2, B, S, G, n))
    rate, state = -rng.exponential(1.0, H), rng.normal(size=(B, H, p, n))
    y, after = expected_ssd(x, dt, rate, b, c, state)
    found, found_after = chunked_ssd(*float32(x, dt, rate, b, c, state), chunk_size=chunk)
    np.testing.assert_allclose(found, y, **TOLERANCE)
    np.testing.assert_allclose(found_after, after, **TOLERANCE)
    args = float32(x[:, 0], dt[:, 0], rate, b[:, 0], c[:, 0], state)
    np.testing.assert_allclose(ssd_step(*args)[0], y[:, 0], **TOLERANCE)
    from_zeros = chunked_ssd(*float32(x, dt, rate, b, c), chunk_size=chunk)
    for one, other in zip(from_zeros, expected_ssd(x, dt, rate, b, c, 0 * state), strict=True):
        np.testing.assert_allclose(one, other, **TOLERANCE)


def test_fast_decay_over_a_long_chunk_does_not_overflow():
    """exp of the decay between two positions of the wrong order would be infinite."""
    x, dt, rate = jnp.ones((1, 64, 1, 1)), jnp.full((1, 64, 1), 9.0), jnp.full(1, -9.0)
    y, state = chunked_ssd(x, dt, rate, x, x)
    np.testing.assert_allclose(y, 9.0)
    np.testing.assert_allclose(state, 9.0)
