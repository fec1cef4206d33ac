"""One body of tests for all backends as they come: their own choice of tiles, GPU kernels in their interpreters.

What is particular to a backend, and other tiles, have files of their own.
"""

import dataclasses
import inspect

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import Kernels
from jaxmoe.kernels.grouped_matmul import backends as tables
from jaxmoe.kernels.grouped_matmul.quantized import as_matrices, dequantize
from tests.support.kernels import (
    FLOAT32,
    MLPS,
    SIZES,
    check_gradient,
    check_mlp,
    check_product,
    exact,
    needs_mosaic,
    packed_stack,
    rows_and_matrices,
)

pytestmark = pytest.mark.covering(most=4)

# Module and options. The dense oracle is held against products in float64 here, and is the measure in the other two.
BACKENDS = {
    "reference": ("reference", {}),
    "portable": ("portable", {}),
    "xla_ragged_dot": ("xla_ragged_dot", {}),
    "triton": ("triton", {"interpret": True}),
    "mosaic_gpu, Hopper": ("mosaic_gpu", {"interpret": True}),
    "mosaic_gpu, Blackwell": ("mosaic_gpu", {"interpret": True, "device_kind": "NVIDIA B200"}),
}
TAKE_NONE_PACKED = [
    name for name, (table, _) in BACKENDS.items() if not {**tables.BACKENDS, **tables.GPU_BACKENDS}[table].formats
]
# Format, block, dtype of the scales, and whether there are zero points.
PACKED = [
    ("float8_e4m3fn", (64, 128), "float32", False),
    ("mxfp4", (1, 32), "uint8", False),
    ("int4", (1, 32), "bfloat16", False),
    ("int4", (1, 32), "bfloat16", True),
]


def backends(*left_out):
    return pytest.mark.parametrize(
        ("module", "options"),
        [
            pytest.param(module, options, marks=needs_mosaic if module == "mosaic_gpu" else (), id=name)
            for name, (module, options) in BACKENDS.items()
            if name not in left_out
        ],
    )


def backend_of(module):
    return {**tables.BACKENDS, **tables.GPU_BACKENDS}[module].load()


def test_all_backends_are_here() -> None:
    assert {module for module, _ in BACKENDS.values()} == {*tables.BACKENDS, *tables.GPU_BACKENDS}


@pytest.mark.parametrize("product", ["grouped_matmul", "expert_mlp"])
@backends()
def test_arguments_are_those_of_the_contract(module, options, product) -> None:
    """Arguments of the same names and kinds; more of them have defaults."""
    wanted = list(inspect.signature(getattr(Kernels, product)).parameters.values())[1:]
    given = inspect.signature(getattr(backend_of(module), product)).parameters
    for each in wanted:
        assert (given[each.name].kind, given[each.name].default) == (each.kind, each.default)
    more = given.keys() - {each.name for each in wanted}
    assert options.keys() - {"device_kind"} <= more
    assert all(given[name].default is not inspect.Parameter.empty for name in more)


@pytest.mark.full
@backends()
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("sizes", "R"), SIZES, ids=str)
def test_product(module, options, sizes, R, dtype) -> None:
    check_product(backend_of(module), sizes, R, 136, dtype, **options)


@pytest.mark.full
@backends("reference")
@pytest.mark.parametrize(("activation", "limit", "gated"), MLPS)
def test_mlp_with_biases(module, options, activation, limit, gated) -> None:
    check_mlp(backend_of(module), activation, limit, gated, **options)


@pytest.mark.full
@backends("reference")
def test_gradient(module, options) -> None:
    hopper = module == "mosaic_gpu" and "device_kind" not in options  # the only one whose gradient is a kernel
    check_gradient(backend_of(module), rounds_cotangents=hopper, **options)


@pytest.mark.full
@backends("mosaic_gpu, Blackwell", *TAKE_NONE_PACKED)  # the public functions refuse those by name
@pytest.mark.parametrize(("format", "block", "scale_dtype", "has_zeros"), PACKED, ids=str)
def test_packed_product(module, options, format, block, scale_dtype, has_zeros) -> None:
    sizes, R = [5, 0, 18, 1], 30
    stack = packed_stack(format, block, scale_dtype, 4, 192, 128)
    if has_zeros:
        zeros = np.random.default_rng(1).integers(0, 16, stack.scales.shape)
        stack = dataclasses.replace(stack, zero_points=jnp.asarray(zeros, jnp.uint8))
    [rows] = rows_and_matrices(R, (1, 128), dtype="bfloat16")[:1]
    out = backend_of(module).grouped_matmul(
        rows, as_matrices(stack), jnp.asarray(sizes, jnp.int32), out_dtype=FLOAT32, **options
    )
    expected = exact(rows, dequantize(stack), sizes)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
