"""The gradients of the GPU kernels, in their interpreters: rows that no group owns may hold anything there, too.

Those of the backends for every platform are in test_gradient.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import mosaic_gpu, triton
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from tests.support.kernels import FLOAT32, needs_mosaic, rows_and_matrices

SIZES, R, D, F = [3, 0, 20], 30, 64, 64


def gradients(backend, x, up, down, dy, **options):
    def mlp(x, up, down):
        return backend.expert_mlp(
            x,
            up,
            down,
            jnp.asarray(SIZES, jnp.int32),
            b_up_pN=None,
            b_down_pD=None,
            combine=combine_halves("silu", None, gated=True),
            out_dtype=FLOAT32,
            **options,
        )

    _, pullback = jax.vjp(mlp, x, up, down)
    return pullback(dy)


# Mosaic's interpreter multiplies with NumPy, which warns of the infinity in rows whose results nobody takes.
@pytest.mark.covering(most=1)
@pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    "backend", [triton, pytest.param(mosaic_gpu, marks=needs_mosaic)], ids=["triton", "mosaic_gpu"]
)
def test_reach_no_gradient(backend):
    x, up, down = rows_and_matrices(R, (3, 2 * F, D), (3, D, F), dtype=jnp.bfloat16)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(R, D)), jnp.float32)
    owned = (np.arange(R) < sum(SIZES))[:, None]

    @jax.jit
    def results(bad):
        return gradients(backend, jnp.where(owned, x, bad), up, down, jnp.where(owned, dy, bad), interpret=True)

    clean = results(0.0)
    assert all(np.asarray(gradient, np.float32).any() for gradient in clean)
    for bad in (np.nan, np.inf):
        jax.tree.map(np.testing.assert_array_equal, results(bad), clean)
