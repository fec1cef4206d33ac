"""The backward pass in grouped products, with dense ones in place of kernels, against the gradient of the dense oracle."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import reference
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from jaxmoe.kernels.grouped_matmul.gradient_products import mlp_gradients, product_gradients
from tests.support.kernels import FLOAT32, MLPS, D, F, arrays, int32, poison

SIZES, R = [5, 0, 9, 1], 19


class Dense:
    """Products of each group's rows alone; rows of no group come out as NaN."""

    def __init__(self):
        self.parts = [slice(end - size, end) for size, end in zip(SIZES, np.cumsum(SIZES), strict=True)]

    def rows(self, parts, dtype):
        rest = jnp.full((R - sum(SIZES), parts[0].shape[1]), jnp.nan)
        return jnp.concatenate([*parts, rest]).astype(dtype)

    def by_rows(self, x, w, b, sizes, out_dtype):
        biases = jnp.zeros(w.shape[:2]) if b is None else b
        return self.rows(
            [wide(x[part]) @ wide(w[g]).T + wide(biases[g]) for g, part in enumerate(self.parts)], out_dtype
        )

    def by_columns(self, dy, w, sizes, out_dtype):
        return self.rows([wide(dy[part]) @ wide(w[g]) for g, part in enumerate(self.parts)], out_dtype)

    def outer(self, dy, x, sizes, out_dtype):
        return jnp.stack([wide(dy[part]).T @ wide(x[part]) for part in self.parts]).astype(out_dtype)


def wide(array):
    return array.astype(jnp.float32)


def assert_near(actual, expected, **tolerance):
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(wide(one), wide(other), **tolerance)


@pytest.mark.parametrize(("activation", "limit", "gated"), MLPS)
def test_of_an_mlp_with_biases(activation, limit, gated):
    groups, halves = len(SIZES), 2 if gated else 1
    x, up, down, b_up, b_down, dy = arrays(
        (R, D), (groups, halves * F, D), (groups, D, F), (groups, halves * F), (groups, D), (R, D)
    )
    inputs, combine = (x * 7, up, down, b_up, b_down), combine_halves(activation, limit, gated=gated)

    def mlp(x, up, down, b_up, b_down):
        return reference.expert_mlp(
            x, up, down, int32(SIZES), b_up_pN=b_up, b_down_pD=b_down, combine=combine, out_dtype=FLOAT32
        )

    expected = jax.jit(lambda *inputs: jax.vjp(mlp, *inputs)[1](dy))(*inputs)

    @jax.jit
    def gradients(x, *others):
        return mlp_gradients(Dense(), poison(x, SIZES), *others, int32(SIZES), poison(dy, SIZES), combine)

    assert_near(gradients(*inputs), expected, rtol=2e-5, atol=5e-6)
    if activation == "silu":
        without = gradients(*inputs[:3], None, None)
        assert without[3:] == (None, None)
        # In bfloat16 dy, h and da are rounded on the way.
        narrow = gradients(*(array.astype(jnp.bfloat16) for array in inputs))
        assert all(array.dtype == jnp.bfloat16 for array in narrow)
        for one, other in zip(narrow, expected, strict=True):
            assert np.linalg.norm(wide(one) - other) < 2**-7 * np.linalg.norm(other)


def test_of_one_product():
    x, w, dy = arrays((R, D), (len(SIZES), F, D), (R, F))

    def product(x, w):
        return reference.grouped_matmul(x, w, int32(SIZES), out_dtype=FLOAT32)

    expected = jax.jit(lambda x, w, dy: jax.vjp(product, x, w)[1](dy))(x, w, dy)
    got = jax.jit(partial(product_gradients, Dense()))(poison(x, SIZES), w, int32(SIZES), poison(dy, SIZES))
    assert_near(got, expected, rtol=2e-5, atol=5e-6)
    assert not np.asarray(got[0])[sum(SIZES) :].any()
