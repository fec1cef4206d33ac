"""Hyper-connections: mixing weights whose rows and columns add up to 1, and streams against the formula in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmoe.config import AveragedStreamsConfig, HyperConnectionConfig
from jaxmoe.layers import STREAMS, ParamFactory, join_streams
from jaxmoe.layers.hyper import HyperConnection, HyperHead, doubly_stochastic
from tests.support.meshes import mesh_of

N, D, EPS = 3, 5, 1e-3
CONFIG = HyperConnectionConfig(streams=N, iterations=4, eps=1e-2)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def made(kind):
    """A module of random weights, and these in float64."""
    module = kind(CONFIG, D, EPS, param=ParamFactory(mesh_of(1, 1, 1), jnp.float32, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for name in ("w", "bias", "scale"):
        param = getattr(module, name)
        param.set_value(jnp.float32(rng.normal(size=param[...].shape)))
    return module, [np.asarray(getattr(module, name)[...], np.float64) for name in ("w", "bias", "scale")]


def normed(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(*x.shape[:2], -1)
    return flat / np.sqrt((flat**2).mean(-1, keepdims=True) + EPS)


def test_rows_and_columns_add_up_to_one():
    x = jax.nn.softmax(jnp.float32(np.random.default_rng(0).normal(size=(50, 4, 4))), axis=-1)
    mixed = doubly_stochastic(x, 30, 1e-6)
    np.testing.assert_allclose(mixed.sum(-1), 1, atol=1e-4)
    np.testing.assert_allclose(mixed.sum(-2), 1, atol=1e-4)
    once = doubly_stochastic(x, 1, 0.0)
    np.testing.assert_allclose(once, x / x.sum(-2, keepdims=True), rtol=1e-6)


def test_streams_are_read_written_and_mixed():
    module, (w, bias, scale) = made(HyperConnection)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 4, N, D)), rng.normal(size=(2, 4, D))
    read_x, given = module(jnp.float32(x))
    weights = normed(x) @ w.T
    parts = [weights[..., :N], weights[..., N : 2 * N], weights[..., 2 * N :]]
    biases = [bias[:N], bias[N : 2 * N], bias[2 * N :]]
    read, write, mix = (part * s + b for part, s, b in zip(parts, scale, biases, strict=True))
    np.testing.assert_allclose(read_x, np.einsum("bsn,bsnd->bsd", sigmoid(read) + 1e-2, x), rtol=1e-4, atol=1e-5)
    mix = np.exp(mix).reshape(2, 4, N, N)
    mix = mix / mix.sum(-1, keepdims=True) + 1e-2
    mix /= mix.sum(-2, keepdims=True) + 1e-2
    for _ in range(3):
        mix /= mix.sum(-1, keepdims=True) + 1e-2
        mix /= mix.sum(-2, keepdims=True) + 1e-2
    expected = 2 * sigmoid(write)[..., None] * y[:, :, None] + np.einsum("bsmn,bsmd->bsnd", mix, x)
    np.testing.assert_allclose(join_streams(jnp.float32(x), given, jnp.float32(y)), expected, rtol=1e-4, atol=1e-5)


def test_the_head_makes_one_stream():
    module, (w, bias, scale) = made(HyperHead)
    x = np.random.default_rng(1).normal(size=(2, 4, N, D))
    read = sigmoid(normed(x) @ w.T * scale + bias) + 1e-2
    np.testing.assert_allclose(module(jnp.float32(x)), np.einsum("bsn,bsnd->bsd", read, x), rtol=1e-4, atol=1e-5)


def test_streams_may_be_averaged_in_the_end():
    past_half, one_of_all = STREAMS[AveragedStreamsConfig]
    assert past_half is HyperConnection
    config = AveragedStreamsConfig(streams=N, iterations=4, eps=1e-2)
    head = one_of_all(config, D, EPS, param=ParamFactory(mesh_of(1, 1, 1), jnp.float32, nnx.Rngs(0)))
    assert not jax.tree.leaves(nnx.state(head))
    x = np.random.default_rng(1).normal(size=(2, 4, N, D))
    np.testing.assert_allclose(head(jnp.float32(x)), x.mean(axis=2), rtol=1e-5, atol=1e-6)
