"""The kernels of gradients for Hopper in Mosaic GPU's interpreter, against products in float64.

What the interpreter does not show is as for the other kernels, see test_mosaic_gpu.py.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.grouped_matmul import reference
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from tests.support.kernels import FLOAT32, int32, needs_mosaic, poison, rows_and_matrices
from tests.support.meshes import mesh_of

pytestmark = [
    needs_mosaic,
    pytest.mark.covering(most=1),
    # The interpreter multiplies with NumPy, which warns of NaN in rows whose results nobody takes.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]

# Sizes of groups, rows, outputs and inputs: empty groups, rows of no group, groups over several stages, of which none begins
# at a multiple of 8; several tiles of outputs and of inputs, which are no multiple of one; swizzles of 64 bytes and of 128.
CASES = [([0, 9, 0, 23], 32, 64, 64), ([5, 0, 130, 1], 141, 160, 288), ([0, 0], 12, 64, 64)]


def products():
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu.backend import _products

    return _products(None, interpret=True)


def float64(array):
    return np.asarray(array.astype(jnp.float32), np.float64)


@pytest.mark.parametrize(("sizes", "R", "N", "K"), CASES[:2], ids=str)
def test_rows_by_columns(sizes, R, N, K):
    dy, _, w = rows_and_matrices(R, (1, N), (len(sizes), N, K), dtype=jnp.bfloat16)
    multiply = jax.jit(partial(products().by_columns, out_dtype=FLOAT32))
    got = multiply(poison(dy, sizes), w, int32(sizes))
    group, owned = np.repeat(np.arange(len(sizes)), sizes), sum(sizes)
    np.testing.assert_allclose(got[:owned], np.einsum("rn,rnk->rk", float64(dy[:owned]), float64(w)[group]), atol=1e-4)


@pytest.mark.parametrize(("sizes", "R", "N", "K"), CASES, ids=str)
def test_outer_products(sizes, R, N, K):
    """Another group's rows are left out though they are no numbers; sizes beyond the rows are cut off."""
    dy = rows_and_matrices(R, (1, N), dtype=jnp.bfloat16)[0]
    x = rows_and_matrices(R, (1, K), dtype=jnp.bfloat16, seed=1)[0]
    ends, bad = np.cumsum(sizes), int(np.argmax(np.asarray(sizes) > 0))
    of_bad = slice(ends[bad] - sizes[bad], ends[bad])
    poisoned = [poison(rows.at[of_bad].set(jnp.nan), sizes) for rows in (dy, x)]
    multiply = jax.jit(partial(products().outer, out_dtype=FLOAT32))
    got = np.asarray(multiply(*poisoned, int32(sizes)))
    for group, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        own = slice(end - size, end)
        expected = float64(dy[own]).T @ float64(x[own])
        if group == bad and size:
            assert np.isnan(got[group]).all()
        else:
            np.testing.assert_allclose(got[group], expected, atol=1e-4)
    if sum(sizes) == R:
        beyond = [*sizes[:-1], sizes[-1] + 100]
        np.testing.assert_array_equal(multiply(*poisoned, int32(beyond)), got)


@pytest.mark.full
def test_of_an_mlp_with_biases():
    """As near as rounding dy, h and the gradient between the products to bfloat16 lets it be."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    sizes, R, D, F = [7, 0, 20], 30, 64, 64
    inputs = rows_and_matrices(R, (3, 2 * F, D), (3, D, F), (3, 2 * F), (3, D), dtype=jnp.bfloat16)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(R, D)), jnp.float32)
    combine = combine_halves("clamped_swiglu", 1.5, gated=True)

    def pullback(backend, *inputs, **options):
        def mlp(x, up, down, b_up, b_down):
            biases = {"b_up_pN": b_up, "b_down_pD": b_down}
            return backend.expert_mlp(
                x, up, down, int32(sizes), **biases, combine=combine, out_dtype=FLOAT32, **options
            )

        return jax.vjp(mlp, *inputs)[1]

    x, *others = inputs
    got = pullback(mosaic_gpu, poison(x, sizes), *others, interpret=True)(poison(dy, sizes))
    expected = pullback(reference, *(array.astype(jnp.float32) for array in inputs))(dy)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        assert np.linalg.norm(float64(one) - other) < 2**-7 * np.linalg.norm(other)
    assert not float64(got[0])[sum(sizes) :].any()
    for of_matrices in got[1:]:
        assert not float64(of_matrices)[1].any()


def test_which_gradients_are_the_kernels():
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu.gradient_products import missing_gradient

    x, up, down = rows_and_matrices(8, (2, 64, 32), (2, 32, 64), dtype=jnp.bfloat16)
    assert missing_gradient(x, up, down) == missing_gradient(x, up, down, device_kind="NVIDIA H200") == ""
    assert "for Blackwell (NVIDIA B200)" in missing_gradient(x, up, down, device_kind="NVIDIA B200")
    assert "rows of bfloat16; got float16" in missing_gradient(x.astype(jnp.float16), up, down)
    assert "multiples of 16 outputs and inputs; got N=24, K=32" in missing_gradient(x, up[:, :24], down)
    assert missing_gradient(x, up[:0], down) == "there is nothing to multiply"


def test_the_model_of_its_times_has_its_tiles():
    from jaxmoe.kernels.grouped_matmul import predict_gradient
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import gradient_kernel

    tiles, modeled = gradient_kernel.choose_gradient_tiles(128, 1536, 2048), predict_gradient.TILES
    assert (tiles.n, tiles.k, tiles.stages) == (modeled.n, modeled.k, modeled.stages)
    assert modeled.m == gradient_kernel.HEIGHT
    assert gradient_kernel.STAGE_ROWS == predict_gradient.STAGE_ROWS


@pytest.mark.parametrize("portable", [False, True])
def test_the_gradient_that_is_asked_for(portable):
    """And inside of `shard_map` it has the types of what varies over the mesh."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    def local(x, w, sizes):
        y = mosaic_gpu.grouped_matmul(x, w, sizes, out_dtype=FLOAT32, portable_gradient=portable)
        return jnp.sum(y)[None]

    summed = jax.shard_map(local, mesh=mesh_of(1, 1, 2), in_specs=(P("ep"), P(), P("ep")), out_specs=P("ep"))
    x, w = rows_and_matrices(32, (2, 64, 64), dtype=jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda *args: jnp.sum(summed(*args)), (0, 1)))(x, w, int32([3, 4, 5, 6])))
    assert ("sum_outer_products" in jaxpr) == ("multiply_by_columns" in jaxpr) == (not portable)
    # Over the devices that share the matrices, their gradient alone is summed.
    assert len(re.findall(r"psum\w*\[", jaxpr)) == 1
