"""Stacks of packed matrices, with the numbers that numpy and ml_dtypes decode them to."""

from typing import NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import QuantizedStack

G, D, F = 6, 96, 64


class Case(NamedTuple):
    """A way of packing. A block of 0 spans the matrix."""

    format: str
    block: tuple[int, int]
    zero_points: bool = False
    scales: type = np.float32
    matrix_scales: bool = False

    def __str__(self):
        more = f"{'-zeros' if self.zero_points else ''}{'-matrix-scales' if self.matrix_scales else ''}"
        return f"{self.format}-{self.block[0]}x{self.block[1]}{more}"


CASES = [
    Case("float8_e4m3fn", (32, 32)),
    Case("float8_e4m3fn", (1, 0)),
    Case("float8_e4m3fn", (0, 0), scales=ml_dtypes.bfloat16),
    Case("float8_e4m3fn", (8, 4)),  # narrower than lanes
    Case("int4", (1, 32)),
    Case("int4", (1, 32), zero_points=True, scales=np.float16),
    Case("int4", (1, 16), zero_points=True),
    Case("int4", (1, 0), zero_points=True),
    Case("int4", (2, 1)),  # a scale for half a byte
    Case("mxfp4", (1, 32)),
    Case("mxfp4", (16, 32)),
    Case("nvfp4", (1, 16), matrix_scales=True),
    Case("int8", (1, 0), scales=ml_dtypes.bfloat16),
    Case("nvfp4", (1, 16)),
    # What a device has of a block that is cut.
    Case("mxfp4", (1, 8)),
    Case("float8_e4m3fn", (32, 16), matrix_scales=True),
    Case("int8", (16, 32)),
]
# The short run's: blocks, a scale for half a byte, and one of each format besides.
_SHORT = {0, 2, 5, 8, 9, 11, 12}
# One of each format, by which all of its code is reached.
OF_EACH_FORMAT = [CASES[i] for i in (0, 5, 9, 11, 12)]
each_case = pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if i in _SHORT else pytest.mark.full) for i, case in enumerate(CASES)], ids=str
)


def codes_of(format, shape, rng):
    """Random codes, one a number; of float8 no NaN."""
    if format not in ("float8_e4m3fn", "int8"):
        return rng.integers(0, 16, shape, np.uint8)
    codes = rng.integers(0, 256, shape, np.uint8)
    return np.where(codes & 0x7F == 0x7F, 0x3A, codes) if format == "float8_e4m3fn" else codes


def pack(case, seed, *shape):
    """A stack of random matrices [*shape], and the same as float64 from numpy's and ml_dtypes' own conversions."""
    rng = np.random.default_rng(seed)
    N, K = shape[-2:]
    block = case.block[0] or N, case.block[1] or K
    blocks = (*shape[:-2], N // block[0], K // block[1])
    codes = codes_of(case.format, shape, rng)
    zeros = rng.integers(0, 16, blocks, np.uint8) if case.zero_points else None

    def spread(of_blocks):
        return of_blocks.astype(np.float64).repeat(block[0], -2).repeat(block[1], -1)

    if case.format in ("float8_e4m3fn", "int8"):
        values = codes.view(ml_dtypes.float8_e4m3fn if case.format == "float8_e4m3fn" else np.int8)
        numbers = values.astype(np.float64)
    else:
        values = codes[..., ::2] | codes[..., 1::2] << 4
        fp4 = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        numbers = codes - (spread(zeros) if case.zero_points else 8.0) if case.format == "int4" else fp4
    # With one float32 a matrix, block scales are as large as their format would have them.
    size = 100 if case.matrix_scales else 1
    if case.format == "mxfp4":
        scales = rng.integers(122, 126, blocks, np.uint8)
        factors = scales.view(ml_dtypes.float8_e8m0fnu)
    else:
        dtype = ml_dtypes.float8_e4m3fn if case.format == "nvfp4" else case.scales
        factors = scales = (size * rng.uniform(0.5, 1.5, blocks) / np.abs(numbers).max()).astype(dtype)
    arrays = {"values": values, "scales": scales, "zero_points": zeros}
    exact = numbers * spread(factors)
    if case.matrix_scales:
        arrays["matrix_scales"] = (rng.uniform(0.5, 1.5, shape[:-2]) / size).astype(np.float32)
        exact *= arrays["matrix_scales"].astype(np.float64)[..., None, None]
    arrays = {name: None if array is None else jnp.asarray(array) for name, array in arrays.items()}
    return QuantizedStack(**arrays, format=case.format, block=block), exact
