"""The gated delta rule in chunks against the recurrence that defines it, token by token in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxmoe.layers.delta_rule import chunked_delta_rule, delta_rule_step
from tests.support.runs import examples

pytestmark = pytest.mark.covering


def recurrence(q, k, v, log_decay, beta, state):
    """S_t = a S_{t-1} (in all directions but k's), then S_tᵀ k = b v + (1 - b) a S_{t-1}ᵀ k, for keys of length 1."""
    state, out = state.copy(), np.zeros_like(v)
    for b, t, h in np.ndindex(*v.shape[:3]):
        key, strength = k[b, t, h], beta[b, t, h]
        forget = np.eye(len(key)) - strength * np.outer(key, key)
        faded = np.exp(log_decay[b, t, h])[:, None] * state[b, h]
        state[b, h] = forget @ faded + strength * np.outer(key, v[b, t, h])
        out[b, t, h] = state[b, h].T @ q[b, t, h]
    return out, state


def draw(seed, B, S, H, k, v, decays=1):
    """Arguments of the rule with decays from almost none to almost all, and some of strength 0 and 1."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(B, S, H, k))
    beta = np.clip(rng.normal(0.5, 0.5, size=(B, S, H)), 0, 1)
    return (
        rng.normal(size=(B, S, H, k)),
        keys / np.linalg.norm(keys, axis=-1, keepdims=True),
        rng.normal(size=(B, S, H, v)),
        -np.exp(rng.uniform(-8, 3, size=(B, S, H, decays))),
        beta,
        rng.normal(size=(B, H, k, v)),
    )


@jax.jit
def in_steps(q, k, v, log_decay, beta, state):
    def step(state, token):
        out, state = delta_rule_step(*token, state)
        return state, out

    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, log_decay, beta)]
    state, out = jax.lax.scan(step, state, tokens)
    return jnp.moveaxis(out, 0, 1), state


in_chunks = jax.jit(chunked_delta_rule, static_argnames="chunk_size")


@settings(max_examples=examples(4, 20))
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(1, 2),
    S=st.integers(1, 23),
    H=st.integers(1, 3),
    k=st.integers(1, 7),
    v=st.integers(1, 7),
    chunk_size=st.sampled_from([1, 2, 5, 8, 64]),
    of_rows=st.booleans(),
)
@example(seed=0, B=1, S=70, H=2, k=5, v=3, chunk_size=64, of_rows=True)  # halves of halves
def test_chunks_and_steps_equal_the_recurrence(seed, B, S, H, k, v, chunk_size, of_rows):
    """With one decay for a memory, and with one for each of its rows."""
    *args, state = draw(seed, B, S, H, k, v, k if of_rows else 1)
    expected, after = recurrence(*args, state)
    with jax.enable_x64(True):
        for found, found_after in (in_chunks(*args, state, chunk_size=chunk_size), in_steps(*args, state)):
            assert found.dtype == found_after.dtype == jnp.float64
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(found_after, after, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decays", [1, 8])
@pytest.mark.parametrize("log_decay", [0.0, -1e-3, -30.0, -1e4])
def test_float32_over_many_chunks_stays_near_the_recurrence(log_decay, decays):
    """Nothing fades, or everything does at once; the same key over and over is the hardest of systems."""
    q, k, v, _, beta, _ = draw(0, 1, 300, 2, 8, 8)
    k[:, 100:200] = k[:, :1]
    args = (q, k, v, np.full((*beta.shape, decays), log_decay), beta)
    empty = np.zeros((1, 2, 8, 8))
    expected, after = recurrence(*args, empty)
    out, state = in_chunks(*(jnp.asarray(x, jnp.float32) for x in args))
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(state - after).max() < 2e-5 * np.abs(after).max()


@pytest.mark.full
def test_a_sequence_in_parts_is_the_whole_sequence():
    *args, _ = draw(3, 2, 40, 3, 4, 5)
    args = [jnp.asarray(x, jnp.float32) for x in args]
    whole, after = in_chunks(*args, chunk_size=16)
    parts, state = [], None
    for start, stop in ((0, 7), (7, 39), (39, 40)):
        out, state = in_chunks(*(x[:, start:stop] for x in args), state, chunk_size=16)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("decays", "length", "chunk_size"), [(1, 11, 4), (3, 40, 32)])
def test_gradients_are_those_of_the_recurrence(decays, length, chunk_size):
    """Also where decays are so strong that the masked half of a chunk's table would overflow."""
    *args, state = draw(5, 1, length, 2, 3, 3, decays)
    args[3] = args[3] * 100

    def loss(rule):
        def total(*args):
            out, after = rule(*args)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(after))

        return total

    with jax.enable_x64(True):
        of_steps, of_chunks = loss(in_steps), loss(lambda *args: chunked_delta_rule(*args, chunk_size=chunk_size))
        expected, found = (jax.jit(jax.grad(rule, argnums=range(6)))(*args, state) for rule in (of_steps, of_chunks))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


def test_rows_with_the_same_decay_are_a_memory_with_one():
    q, k, v, log_decay, beta, state = (jnp.asarray(x, jnp.float32) for x in draw(7, 1, 100, 2, 6, 4))
    one, after_one = in_chunks(q, k, v, log_decay, beta, state)
    each, after_each = in_chunks(q, k, v, jnp.broadcast_to(log_decay, k.shape), beta, state)
    np.testing.assert_allclose(each, one, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(after_each, after_one, rtol=1e-4, atol=1e-5)


def test_rows_that_fade_at_once_beside_rows_that_never_do_stay_apart():
    """No quotient of their decays overflows, over chunks in which the one is exp(-6400)."""
    q, k, v, _, beta, state = draw(9, 1, 130, 2, 4, 4)
    log_decay = np.broadcast_to(np.array([0.0, -1e-4, -5.0, -100.0]), k.shape)
    expected, after = recurrence(q, k, v, log_decay, beta, state)
    out, found_after = in_chunks(*(jnp.asarray(x, jnp.float32) for x in (q, k, v, log_decay, beta, state)))
    assert np.abs(out - expected).max() < 2e-5 * np.abs(expected).max()
    assert np.abs(found_after - after).max() < 2e-5 * np.abs(after).max()
