"""Residual streams behind gates of low rank: what is read and written against the formula in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.config import GatedStreamsConfig
from jaxmoe.layers import ParamFactory, join_streams
from jaxmoe.layers.gated_streams import GatedStreams, GatedStreamsHead
from tests.support.meshes import mesh_of

N, D, R, EPS = 3, 5, 4, 1e-3


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("kind", [GatedStreams, GatedStreamsHead])
def test_streams_are_read_feature_by_feature_and_written(kind):
    module = kind(
        GatedStreamsConfig(streams=N, rank=R), D, EPS, param=ParamFactory(mesh_of(1, 1, 1), jnp.float32, nnx.Rngs(0))
    )
    rng = np.random.default_rng(0)
    module.norm.set_value(jnp.float32(rng.normal(size=N * D)))
    x, y = rng.normal(size=(2, 4, N, D)), rng.normal(size=(2, 4, D))
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    normed = (normed * (1 + np.asarray(module.norm[...], np.float64).reshape(N, D))).reshape(2, 4, -1)
    gate = normed @ np.asarray(module.w_down[...], np.float64).T / N
    gate = sigmoid(gate * sigmoid(gate) @ np.asarray(module.w_up[...], np.float64).T)
    read = (gate * normed).reshape(2, 4, N, D).mean(2)
    if kind is GatedStreamsHead:
        np.testing.assert_allclose(module(jnp.float32(x)), read, rtol=1e-4, atol=1e-5)
        return
    found, weights = module(jnp.float32(x))
    np.testing.assert_allclose(found, read, rtol=1e-4, atol=1e-5)
    write = 2 * sigmoid(normed @ np.asarray(module.w_write[...], np.float64).T / N)
    joined = join_streams(jnp.float32(x), weights, jnp.float32(y))
    np.testing.assert_allclose(joined, x + write[..., None] * y[:, :, None], rtol=1e-4, atol=1e-5)


def test_sizes_are_positive():
    with pytest.raises(ValueError, match="rank"):
        GatedStreamsConfig(streams=2, rank=0)
