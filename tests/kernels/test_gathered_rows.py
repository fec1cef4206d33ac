"""Rows that an MLP takes by an index: the same as rows that were gathered before, by every backend, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import BACKENDS, expert_mlp, mosaic_gpu, triton
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from jaxmoe.kernels.grouped_matmul.quantized import as_matrices
from tests.support.kernels import (
    FLOAT32,
    D,
    G,
    arrays,
    each_regime,
    int32,
    mlp_arrays,
    needs_mosaic,
    packed_stack,
    rows_and_matrices,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning"),
    # Mosaic's interpreter multiplies with NumPy, which warns of the infinity in rows whose results nobody takes.
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]


def poisoned_index(x_TD, sizes, R, bad=np.nan, seed=0):
    """Rows at R places, some of them several times, and x with a last row that only places have that no group owns."""
    owned = int(np.sum(sizes))
    index = np.random.default_rng(seed).integers(0, len(x_TD) - 1, R)
    index[owned:] = len(x_TD) - 1
    assert len(set(index[:owned])) < owned
    return int32(index), x_TD.at[-1].set(bad)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@each_regime
def test_results_and_gradients(backend, R) -> None:
    sizes = np.array([R // 2, 0, 3, 0, 1, 0])
    x_TD, *weights = mlp_arrays(R // 3)
    [dy_RD] = arrays((R, D), seed=7)
    index_R, poisoned_TD = poisoned_index(x_TD, sizes, R)

    def by_index(x_TD, *weights):
        return expert_mlp(x_TD, *weights, int32(sizes), index_R=index_R, backend=backend)

    def oracle(x_TD, *weights):
        return expert_mlp(x_TD[index_R], *weights, int32(sizes), backend="reference")

    y_RD, pull_back = jax.vjp(jax.jit(by_index), poisoned_TD, *weights)
    expected, pull_back_oracle = jax.vjp(oracle, x_TD, *weights)
    np.testing.assert_allclose(y_RD, expected, rtol=2e-5, atol=5e-6)
    poisoned_dy = dy_RD.at[int(sizes.sum()) :].set(jnp.nan)
    for actual, right in zip(pull_back(poisoned_dy), pull_back_oracle(dy_RD), strict=True):
        np.testing.assert_allclose(actual, right, rtol=2e-5, atol=2e-5)


SIZES, R, T = [5, 0, 28, 1], 37, 16
KERNELS = [
    pytest.param(triton, {}, id="triton"),
    pytest.param(mosaic_gpu, {}, id="mosaic_gpu", marks=needs_mosaic),
    pytest.param(mosaic_gpu, {"rows_lead": True}, id="mosaic_gpu, rows lead", marks=needs_mosaic),
    pytest.param(mosaic_gpu, {"stages": 2}, id="mosaic_gpu, two stages", marks=needs_mosaic),
    pytest.param(mosaic_gpu, {"splits": 2}, id="mosaic_gpu, parts", marks=needs_mosaic),
    pytest.param(mosaic_gpu, {"device_kind": "NVIDIA B200"}, id="mosaic_gpu, Blackwell", marks=needs_mosaic),
]


def tiles_of(rows_lead=False, stages=4, splits=1):
    swapped = {} if rows_lead else {"swapped": True}
    m, n = (128, 64) if rows_lead else (24, 128)
    return {"tiles": (mosaic_gpu.Tiles(m=m, n=n, k=32, stages=stages, splits=splits, **swapped), None)}


def mlp_of(backend, options):
    def mlp(x, up, down, b_up, b_down, index):
        more = {} if index is None else {"index_R": index}
        return backend.expert_mlp(
            x,
            up,
            down,
            int32(SIZES),
            b_up_pN=b_up,
            b_down_pD=b_down,
            combine=combine_halves("silu", None, gated=True),
            out_dtype=FLOAT32,
            interpret=True,
            **more,
            **options,
        )

    return mlp


@pytest.mark.covering(most=2)
@pytest.mark.parametrize(("backend", "options"), KERNELS)
def test_kernels_take_the_rows_themselves(backend, options) -> None:
    """Bit for bit: no sum has another order."""
    x, up, down, b_up, b_down = rows_and_matrices(
        T, (4, 2 * 64, 128), (4, 128, 64), (4, 2 * 64), (4, 128), dtype=jnp.bfloat16
    )
    if backend is mosaic_gpu and "device_kind" not in options:
        options = tiles_of(**options)
    mlp = mlp_of(backend, options)
    weights = up, down, b_up, b_down
    index, poisoned = poisoned_index(x, SIZES, R)
    expected = mlp(x[index], *weights, None)
    assert np.any(expected)
    np.testing.assert_array_equal(mlp(poisoned, *weights, index), expected)


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(triton, id="triton"),
        pytest.param(mosaic_gpu, id="mosaic_gpu", marks=[needs_mosaic, pytest.mark.full]),
    ],
)
def test_gradients_of_kernels(backend) -> None:
    """Those of x[index], by plain XLA, of the kernel's own products."""
    x, *weights = rows_and_matrices(T, (4, 2 * 64, 64), (4, 64, 64), (4, 2 * 64), (4, 64), dtype=jnp.bfloat16)
    mlp = mlp_of(backend, {})
    index, poisoned = poisoned_index(x, SIZES, R)
    [dy] = arrays((R, 64), seed=3)

    def pulled_back(x, by_index, dy):
        def function(x, *weights):
            return mlp(x, *weights, index) if by_index else mlp(x[index], *weights, None)

        return jax.jit(lambda *args: jax.vjp(function, *args)[1](dy))(x, *weights)

    expected = pulled_back(x, False, dy)
    assert all(np.asarray(gradient, np.float32).any() for gradient in expected)
    # The last row of x is of places alone that no group owns, where x and dy hold NaN.
    actual = pulled_back(poisoned, True, dy.at[sum(SIZES) :].set(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.covering(most=1)
@needs_mosaic
@pytest.mark.parametrize(
    ("format", "block", "scales", "activations"),
    [
        ("mxfp4", (1, 32), "uint8", "none"),
        ("float8_e4m3fn", (64, 128), "float32", "fp8_block"),
        ("float8_e4m3fn", (64, 128), "float32", "fp8_static"),
        ("int8", (1, 128), "float32", "int8_token"),
    ],
)
def test_rows_by_packed_matrices(format, block, scales, activations) -> None:
    """Rows are split in two parts, or rounded, before they are gathered; not where they are rounded by their group."""
    x, _ = rows_and_matrices(T, (1, 128), dtype=jnp.bfloat16)
    up, down = (as_matrices(packed_stack(format, block, scales, 4, *shape)) for shape in ((256, 128), (128, 128)))
    static = jnp.linspace(0.01, 0.04, 8, dtype=jnp.float32).reshape(4, 2)
    options = {"activations": activations, "input_scales": static if activations == "fp8_static" else None}
    mlp = mlp_of(mosaic_gpu, options)
    index, poisoned = poisoned_index(x, SIZES, R)
    expected = mlp(x[index], up, down, None, None, None)
    assert np.any(expected)
    np.testing.assert_array_equal(mlp(poisoned, up, down, None, None, index), expected)


def test_which_program_gathers() -> None:
    """The kernels' programs for GPUs hold no gathered rows; those of others do, once."""
    x_TD, *weights = mlp_arrays(20, dtype=jnp.bfloat16)

    def gathers(backend):
        program = jax.make_jaxpr(
            lambda x, *w: expert_mlp(x, *w, int32([40] * G), index_R=int32([3] * 240), backend=backend)
        )
        return f"bf16[240,{D}] = gather" in str(program(x_TD, *weights))

    assert gathers("portable")
    assert not gathers("triton")


@pytest.mark.parametrize(("row_bytes", "swizzle"), [(32, 32), (64, 64), (64, 32), (128, 128), (256, 128)])
def test_places_in_shared_memory(row_bytes, swizzle) -> None:
    """As the accelerator's documentation has them: in 8 rows of a swizzle, 16 bytes change places within their row."""
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu.gather import place_of

    m, each = 24, swizzle // 16
    seen = np.full(m * row_bytes // 16, -1)
    for row in range(m):
        for chunk in range(row_bytes // 16):
            within = chunk % each ^ (row * swizzle // 128 % each)
            block = row // 8 * (row_bytes // swizzle) + chunk // each
            place = place_of(row, chunk, row_bytes, swizzle)
            assert place == (block * 8 + row % 8) * swizzle + within * 16
            seen[place // 16] = row
    assert (seen >= 0).all()


def test_what_is_no_index() -> None:
    x_TD, *weights = mlp_arrays(4)
    with pytest.raises(ValueError, match="index must be int32"):
        expert_mlp(x_TD, *weights, int32([1] * G), index_R=jnp.zeros(6))
    with pytest.raises(ValueError, match="names 6 rows, and x has none"):
        expert_mlp(x_TD[:0], *weights, int32([1] * G), index_R=int32([0] * 6))
    assert expert_mlp(x_TD, *weights, int32([0] * G), index_R=int32([])).shape == (0, D)
