"""Rows that are rounded to 8 bits before a product: against numpy and ml_dtypes, and products in float64."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.grouped_matmul import BACKENDS, ROW_FORMATS, dequantize, expert_mlp, grouped_matmul, quantize_rows
from tests.support.kernels import arrays, exact, int32, needs_mosaic, packed_stack, poison, rows_and_matrices
from tests.support.meshes import mesh_of

DYNAMIC = [name for name, form in ROW_FORMATS.items() if form and not form.static]
STATIC = [name for name, form in ROW_FORMATS.items() if form and form.static]
each_format = pytest.mark.parametrize("format", [*DYNAMIC, *STATIC])
# These take packed matrices.
each_backend = pytest.mark.parametrize("backend", [name for name, backend in BACKENDS.items() if backend.formats])


def quantized(x_RK, format, scales_R=None):
    """Values and scales, each as float32, by numpy."""
    x_RK = np.asarray(x_RK, np.float32)
    K = x_RK.shape[1]
    block = 128 if "block" in format else K
    blocks = [x_RK[:, first : first + block] for first in range(0, K, block)]
    dtype, largest = (ml_dtypes.float8_e4m3fn, 448) if format.startswith("fp8") else (np.int8, 127)
    scales = [np.abs(b).max(1) / np.float32(largest) if scales_R is None else scales_R for b in blocks]
    if format.endswith("e8m0"):
        scales = [np.exp2(np.ceil(np.log2(s))) for s in scales]
    values = [np.clip(b / s[:, None], -largest, largest) for b, s in zip(blocks, scales, strict=True)]
    values = [(np.rint(v) if dtype == np.int8 else v).astype(dtype).astype(np.float32) for v in values]
    return np.concatenate(values, 1), np.stack(scales, 1)


def rounded(x_RK, format, scales_R=None):
    """values · scales, in float64."""
    values, scales = quantized(x_RK, format, scales_R)
    block = 128 if "block" in format else x_RK.shape[1]
    return values.astype(np.float64) * scales.repeat(block, 1)[:, : x_RK.shape[1]]


@each_format
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_rows(format, dtype) -> None:
    rng = np.random.default_rng(0)
    x_RK = jnp.asarray(rng.normal(size=(40, 200)) * np.exp(3 * rng.normal(size=(40, 1))), dtype)
    scales_R = None if format in DYNAMIC else jnp.asarray(rng.uniform(0.001, 0.01, 40), jnp.float32)  # some saturate
    rows = jax.jit(lambda x, scales: quantize_rows(x, format, scales_R=scales))(x_RK, scales_R)
    values, scales = quantized(x_RK, format, scales_R)
    assert rows.values.dtype == ROW_FORMATS[format].dtype
    assert rows.scales.dtype == jnp.float32
    np.testing.assert_allclose(rows.scales, scales, rtol=2e-7)
    # Numbers of bfloat16 lie halfway between two rather often, and XLA for CPU does not divide to the last bit.
    differ = np.asarray(rows.values, np.float32) != values
    assert differ.mean() <= (2e-3 if dtype == "bfloat16" else 0)
    np.testing.assert_allclose(
        rows.values.astype(jnp.float32), values, rtol=1 / 7, atol=1.01 if "int8" in format else 0.01
    )


@pytest.mark.parametrize("format", DYNAMIC)
def test_rows_of_zeros_and_of_the_smallest_numbers_are_finite(format) -> None:
    rows = quantize_rows(jnp.array([[0.0, -0.0], [1e-44, 0.0], [3e38, -3e38]]), format)
    assert np.isfinite(np.asarray(rows.values, np.float32)).all()
    assert (np.asarray(rows.scales) > 0).all()
    assert not np.asarray(rows.values, np.float32)[0].any()


@pytest.mark.parametrize("K", [24, 64, 160])
def test_scales_of_rows_that_devices_share_are_those_of_whole_rows(K) -> None:
    """Blocks of 128 that end inside of a device's columns, and that are whole there."""
    mesh, sizes = mesh_of(1, 4, 2), ("tp", "ep")
    x_RK = jnp.asarray(np.random.default_rng(0).normal(size=(5, 8 * K)) * np.arange(1, 8 * K + 1), jnp.float32)

    def of_each_format(x, **options):
        for format in DYNAMIC:
            rows = quantize_rows(x, format, **options)
            yield rows.values.astype(jnp.float32), jnp.repeat(rows.scales, rows.block, axis=1)[:, : x.shape[1]]

    def here(x):
        return [*of_each_format(x, split_over=sizes)]

    split = P(None, sizes)
    found = jax.jit(jax.shard_map(here, mesh=mesh, in_specs=split, out_specs=split))(x_RK)
    for format, of_parts, of_whole in zip(DYNAMIC, found, of_each_format(x_RK), strict=True):
        for part, whole in zip(of_parts, of_whole, strict=True):
            np.testing.assert_array_equal(part, whole, err_msg=format)


def test_ties_go_to_even() -> None:
    halves = jnp.array([[127.0, 0.5, 1.5, -2.5, 126.5]])
    assert quantize_rows(halves, "int8_token").values.tolist() == [[127, 0, 2, -2, 126]]
    sixteenths = jnp.array([[448.0, 1.0625, 1.1875, -1.0625]])  # between neighbors of e4m3
    assert quantize_rows(sixteenths, "fp8_token").values.astype(jnp.float32).tolist() == [[448, 1.0, 1.25, -1.0]]


def silu(x):
    return x / (1 + np.exp(-x))


@each_backend
@each_format
@pytest.mark.covering(most=1)
def test_products_of_rounded_rows(format, backend) -> None:
    """Rows and h of an MLP are rounded, each by its own group's scale where that is given."""
    sizes, R, G, D, F = [5, 0, 18, 1], 30, 4, 192, 64
    group_R = np.repeat(range(G), sizes)
    up = packed_stack("float8_e4m3fn", (64, 64), "float32", 2 * G, F, D)
    up = jax.tree.map(lambda array: array.reshape(G, 2, *array.shape[1:]), up)
    down = packed_stack("int4", (1, 32), "bfloat16", G, D, F)
    x, b_up, b_down = rows_and_matrices(R, (G, 2, F, D), (G, D))[:3]
    b_up = b_up[..., 0]
    scales = None
    if format in STATIC:
        scales = jnp.asarray(np.random.default_rng(1).uniform(0.01, 0.1, (G, 2)), jnp.float32)
    options = {"activations": format, "backend": backend, "input_scales_p2": scales}
    y = jax.jit(lambda x, *biases: expert_mlp(
        x, up, down, int32(sizes), b_gate_up_p2F=biases[0], b_down_pD=biases[1], **options
    ))(poison(x, sizes), b_up, b_down)  # fmt: skip

    def of_rows(number):
        return None if scales is None else np.asarray(scales)[group_R, number]

    x_RD = rounded(x[: sum(sizes)], format, of_rows(0))
    w_up, w_down = jax.jit(lambda *stacks: [*map(dequantize, stacks)])(up, down)
    both = [exact(x_RD, w_up[:, half], sizes, b_up[:, half]) for half in (0, 1)]
    h_RF = rounded((silu(both[0]) * both[1]).astype(np.float32), format, of_rows(1))
    expected = exact(h_RF, w_down, sizes, b_down)
    # A number of h that lies between two of its format may go either way.
    errors = np.abs(np.asarray(y)[: sum(sizes)] - expected) / np.abs(expected).max()
    assert np.median(errors) < 1e-5
    assert errors.max() < 2e-2
    assert not np.asarray(y)[sum(sizes) :].any()


@pytest.mark.full
def test_gradients_are_as_if_nothing_were_rounded() -> None:
    stack, sizes = packed_stack("float8_e4m3fn", (1, 128), "float32", 2, 64, 128), int32([3, 5])
    x, weights = rows_and_matrices(8, (2, 64, 128))[0], np.random.default_rng(0).normal(size=(8, 64))

    def loss(x, **options):
        return jnp.sum(grouped_matmul(x, stack, sizes, **options) * weights)

    actual, expected = (jax.grad(loss)(x, **options) for options in ({"activations": "fp8_block"}, {}))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert float(loss(x, activations="fp8_block")) != float(loss(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activations": "fp4"}, r"activations must be one of \['none', 'fp8_token'.*got 'fp4'"),
        (
            {"activations": "fp8_static"},
            r"scales are given with activations fp8_static and int8_static.*without them. Give",
        ),
        ({"input_scales_G": jnp.ones(2)}, r"scales are given with .*; got 'none' with them. Leave them out"),
        (
            {"activations": "int8_static", "input_scales_G": jnp.ones((2, 1))},
            r"input_scales must be float32 of shape \(2,\); got float32 of shape \(2, 1\). Reshape",
        ),
        (
            {"activations": "fp8_token", "rhs_GNK": jnp.ones((2, 64, 128))},
            "activations 'fp8_token' go with packed matrices; rhs is float32. Use 'none'",
        ),
    ],
)
def test_refuses(change, message) -> None:
    arguments = {
        "lhs_RK": jnp.ones((3, 128)),
        "rhs_GNK": packed_stack("int8", (1, 128), "float32", 2, 64, 128),
        "group_sizes_G": int32([1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments | change)


def test_quantize_rows_wants_a_format() -> None:
    with pytest.raises(ValueError, match=r"format must be one of \['fp8_token', .*got 'none'"):
        quantize_rows(jnp.ones((2, 3)), "none")


# Format, block of the matrices, what rows are rounded to, and their width.
KERNEL_CASES = [
    ("float8_e4m3fn", (128, 128), "fp8_block", 256),
    ("float8_e4m3fn", (64, 64), "fp8_block", 192),  # the last block of a row is half of one
    ("float8_e4m3fn", (128, 128), "fp8_block_e8m0", 256),
    ("float8_e4m3fn", (1, 256), "fp8_token", 256),
    ("float8_e4m3fn", (128, 128), "fp8_static", 256),
    ("int8", (1, 256), "int8_token", 256),
]


@needs_mosaic
@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("format", "block", "activations", "K"), KERNEL_CASES, ids=str)
def test_hopper_multiplies_them_as_they_are(format, block, activations, K) -> None:
    """In the interpreter, both for few rows and for many: sums of exact products, as the portable backend has them."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu
    from jaxmoe.kernels.grouped_matmul.quantized import as_matrices

    stack = packed_stack(format, block, "float32", 4, 256, K)
    matrices = jax.jit(dequantize)(stack)
    multiply = jax.jit(
        partial(mosaic_gpu.grouped_matmul, activations=activations, out_dtype=jnp.dtype(jnp.float32), interpret=True)
    )
    scales = jnp.asarray([0.01, 0.02, 0.03, 0.04], jnp.float32) if activations in STATIC else None
    for sizes, R in (([5, 0, 18, 1], 30), ([100, 0, 91, 40], 240)):
        x = rows_and_matrices(R, (1, K))[0]
        of_rows = None if scales is None else np.asarray(scales)[np.repeat(range(4), sizes)]
        expected = exact(rounded(x[: sum(sizes)], activations, of_rows), matrices, sizes)
        y = multiply(poison(x, sizes), as_matrices(stack), int32(sizes), input_scales=scales)
        np.testing.assert_allclose(y[: sum(sizes)], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        assert not np.asarray(y)[sum(sizes) :].any()


@needs_mosaic
@pytest.mark.full
def test_hopper_mlp_is_the_portable_one() -> None:
    from jaxmoe.kernels.grouped_matmul import backends, mosaic_gpu
    from jaxmoe.kernels.grouped_matmul.combine import combine_halves
    from jaxmoe.kernels.grouped_matmul.quantized import as_matrices

    b_up, b_down = arrays((3, 256), (3, 128), dtype=jnp.bfloat16)
    x = rows_and_matrices(30, (1, 128), dtype=jnp.bfloat16)[0]
    up, down = (
        as_matrices(packed_stack("float8_e4m3fn", (128, 128), "float32", 3, *s)) for s in ((256, 128), (128, 128))
    )
    options = {"b_up_pN": b_up, "b_down_pD": b_down, "combine": combine_halves("silu", None, gated=True)}
    arguments = (x, up, down, int32([7, 0, 20]))
    options["out_dtype"] = jnp.dtype(jnp.float32)
    y = mosaic_gpu.expert_mlp(*arguments, **options, activations="fp8_block", interpret=True)
    portable = backends.load_backend("portable", up, down, activations="fp8_block")
    expected = portable.expert_mlp(*arguments, **options)
    errors = np.abs(np.asarray(y) - expected) / float(jnp.abs(expected).max())
    assert np.median(errors) < 1e-3
    assert errors.max() < 4e-2


@needs_mosaic
def test_hopper_refuses_rows_and_matrices_of_two_dtypes() -> None:
    stack = packed_stack("int4", (1, 32), "bfloat16", 2, 64, 128)
    for activations, dtype in itertools.product(["fp8_token", "int8_token"], ["bfloat16", "float32"]):
        with pytest.raises(NotImplementedError, match="matrices of their dtype.*got int4: use the portable"):
            grouped_matmul(
                jnp.ones((3, 128), dtype), stack, int32([1, 2]), activations=activations, backend="mosaic_gpu"
            )
