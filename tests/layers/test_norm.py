"""Every norm against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.layers import NORMS, ParamFactory, params_by_path
from tests.support.meshes import mesh_of

EPS = 0.1  # so large that it matters where it is added


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)


def layer(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS)


FORMULAS = {
    "rms": lambda x, weight, bias: rms(x, weight),
    "rms_float32": lambda x, weight, bias: rms(x, weight),
    "rms_zero_centered": lambda x, weight, bias: rms(x, 1 + weight),
    "layer": lambda x, weight, bias: layer(x, weight) + bias,
    "layer_without_bias": lambda x, weight, bias: layer(x, weight),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_its_formula(name):
    norm = NORMS[name](6, EPS, param=ParamFactory(mesh_of(1, 1, 1), jnp.float32, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    values = {path: rng.normal(size=6) for path in ("weight", "bias")}
    for path, param in params_by_path(norm).items():
        param.set_value(jax.device_put(jnp.float32(values[path]), param.get_value().sharding))
    x = rng.normal(size=(2, 3, 6))
    np.testing.assert_allclose(norm(jnp.float32(x)), FORMULAS[name](x, **values), atol=1e-5)


def test_only_the_float32_norms_round_once():
    """Rounding before the weight as well is what most models do, and not the same."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 64)), jnp.bfloat16)
    weight = np.random.default_rng(2).normal(size=64).astype(jnp.bfloat16)

    def error(name: str) -> float:
        norm = NORMS[name](64, EPS, param=ParamFactory(mesh_of(1, 1, 1), jnp.bfloat16, nnx.Rngs(0)))
        norm.weight.set_value(jax.device_put(weight, norm.weight.get_value().sharding))
        out = norm(x)
        assert out.dtype == jnp.bfloat16
        exact = rms(np.float64(x), np.float64(weight)).astype(jnp.bfloat16)
        return float(np.mean(np.asarray(out) != exact))

    assert error("rms_float32") < 0.01 < error("rms")
