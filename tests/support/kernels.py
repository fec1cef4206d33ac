"""Checks that every backend has to pass, each given as its module and options of its own."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import QuantizedStack, reference
from jaxmoe.kernels.grouped_matmul.combine import combine_halves

OLD = jax.__version_info__ < (0, 11, 2)
needs_mosaic = pytest.mark.skipif(OLD, reason="the kernel is written for jax 0.11.2 and newer")
FLOAT32 = jnp.dtype(jnp.float32)

# Empty groups; groups of less than a tile and of more, over several tiles, none at a multiple of 8; rows that no group owns;
# a number of rows that is no multiple of 8.
SIZES = [([5, 0, 130, 1], 141), ([0, 0, 0], 24), ([1, 1, 1, 1], 4), ([0, 9, 0, 23], 32)]
# Activation, its limit, and whether there is a gate.
MLPS = [
    ("silu", None, True),
    pytest.param("gelu", None, True, marks=pytest.mark.full),
    ("clamped_swiglu", 1.5, True),
    pytest.param("limited_swiglu", 1.5, True, marks=pytest.mark.full),
    pytest.param("situ", 0.5, True, marks=pytest.mark.full),
    ("relu2", None, False),
]


G, D, F = 6, 48, 16  # groups, model width and expert width of the table's tests
# Rows allocated in the two regimes of `rows_per_tile`; neither is a multiple of anything in sight.
REGIMES = {"few rows": 11, "many rows": 67}
each_regime = pytest.mark.parametrize("R", REGIMES.values(), ids=REGIMES)


def arrays(*shapes, dtype=jnp.float32, seed=0):
    """Random arrays whose products over the last dim have terms that add up to about one."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[-1]), dtype) for shape in shapes]


def rows_and_matrices(R, *shapes, dtype=jnp.float32, seed=0):
    """Rows [R, K] of unit variance for matrices [groups, N, K], and `arrays` of all shapes."""
    rows = np.random.default_rng([seed, R]).normal(size=(R, shapes[0][-1]))
    return [jnp.asarray(rows, dtype), *arrays(*shapes, dtype=dtype, seed=seed)]


def mlp_arrays(R, dtype=jnp.float32, groups=G):
    return rows_and_matrices(R, (groups, 2, F, D), (groups, D, F), dtype=dtype)


def int32(sizes):
    return jnp.asarray(sizes, jnp.int32)


def poison(rows, sizes):
    """Put NaN wherever no group owns the row."""
    owned = np.arange(len(rows)) < np.sum(sizes)
    return jnp.where(owned[:, None], rows, jnp.nan)  # one program for all sizes, as an update of a slice is not


def exact(rows, matrices, sizes, biases=None):
    """The product in float64; zeros where no group owns the row."""
    rows, matrices = np.asarray(rows, np.float64), np.asarray(matrices, np.float64)
    out, start = np.zeros((len(rows), matrices.shape[1])), 0
    for group, size in enumerate(sizes):
        out[start : start + size] = rows[start : start + size] @ matrices[group].T
        if biases is not None:
            out[start : start + size] += np.asarray(biases[group], np.float64)
        start += size
    return out


def packed_stack(format, block, scale_dtype, G, N, K, seed=0):
    rng = np.random.default_rng(seed)
    if format == "float8_e4m3fn":
        values = jnp.asarray(rng.normal(size=(G, N, K)), jnp.float8_e4m3fn)
    elif format == "int8":
        values = jnp.asarray(rng.integers(-128, 128, (G, N, K)), jnp.int8)
    else:
        values = jnp.asarray(rng.integers(0, 256, (G, N, K // 2)), jnp.uint8)
    shape = (G, N // block[0], K // block[1])
    if scale_dtype == "uint8":
        scales = jnp.asarray(rng.integers(120, 126, shape), jnp.uint8)
    else:
        scales = jnp.asarray(rng.uniform(0.01, 0.1, shape), scale_dtype)
    factors = jnp.asarray(rng.uniform(0.5, 2, G), jnp.float32) if format == "nvfp4" else None
    return QuantizedStack(values=values, scales=scales, matrix_scales=factors, format=format, block=block)


def check_product(backend, sizes, R, N, dtype, **options) -> None:
    """Against the product in float64, with NaN in the rows that no group owns."""
    rows, matrices = rows_and_matrices(R, (len(sizes), N, 96), dtype=dtype)
    multiply = jax.jit(partial(backend.grouped_matmul, out_dtype=FLOAT32, **options))
    out = multiply(poison(rows, sizes), matrices, int32(sizes))
    np.testing.assert_allclose(out, exact(rows, matrices, sizes), atol=1e-5)
    assert not np.asarray(out)[sum(sizes) :].any()


def check_mlp(backend, activation, limit, gated, **backend_options) -> None:
    """With biases, against the dense oracle."""
    sizes, halves, D, F = [7, 0, 20], 2 if gated else 1, 64, 64
    x, up, down, b_up, b_down = rows_and_matrices(
        30, (3, halves * F, D), (3, D, F), (3, halves * F), (3, D), dtype=jnp.bfloat16
    )
    options = {"combine": combine_halves(activation, limit, gated=gated), "out_dtype": FLOAT32}
    arguments = (x, up, down, int32(sizes))
    out, expected = (
        jax.jit(partial(mlp, **options))(*arguments, b_up_pN=b_up, b_down_pD=b_down)
        for mlp in (partial(backend.expert_mlp, **backend_options), reference.expert_mlp)
    )
    # Both round h to bfloat16; where that falls to different sides, by one part in 2^8 of one of F terms.
    np.testing.assert_allclose(out, expected, atol=2e-3)


def check_gradient(backend, *, rounds_cotangents=False, **backend_options) -> None:
    """Against that of the dense oracle; a kernel rounds cotangents to bfloat16, and adds up those of sixty rows."""
    rows, matrices = rows_and_matrices(70, (2, 32, 64), dtype=jnp.bfloat16)
    options = {"group_sizes_G": int32([3, 60]), "out_dtype": FLOAT32}

    def total(function, **more):
        return jax.grad(lambda rows, matrices: jnp.sum(function(rows, matrices, **options, **more) ** 2), (0, 1))

    got = total(backend.grouped_matmul, **backend_options)(rows, matrices)
    expected = total(reference.grouped_matmul)(rows, matrices)
    for one, other in zip(got, expected, strict=True):
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        atol = 4e-3 * float(jnp.abs(other).max()) if rounds_cotangents else 2e-2
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=atol)


def widths_of_single_rows(N, tiles, monkeypatch, **options) -> set[int]:
    """Outputs that are copied together where a single row is.

    On a GPU such a copy is one run of bytes and would write what is beyond the matrix into the next row; the interpreter
    leaves it out, as it does of copies of more rows.
    """
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import pipeline

    copy, widths = pipeline.plgpu.copy_smem_to_gmem, set()

    def recorded(source, target, **more):
        if source.shape[0] == 1:
            widths.add(source.shape[1])
        copy(source, target, **more)

    monkeypatch.setattr(pipeline.plgpu, "copy_smem_to_gmem", recorded)
    check_product(mosaic_gpu, [3, 8], 16, N, jnp.bfloat16, tiles=tiles, interpret=True, **options)
    return widths
