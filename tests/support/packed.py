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

    def __str__(self):
        return f"{self.format}-{self.block[0]}x{self.block[1]}{'-zeros' if self.zero_points else ''}"


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
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def codes_of(format, shape, rng):
    """Random codes, one a number; of float8 no NaN."""
    if format != "float8_e4m3fn":
        return rng.integers(0, 16, shape, np.uint8)
    codes = rng.integers(0, 256, shape, np.uint8)
    return np.where(codes & 0x7F == 0x7F, 0x3A, codes)


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

    if case.format == "float8_e4m3fn":
        values = codes.view(ml_dtypes.float8_e4m3fn)
        numbers = values.astype(np.float64)
    else:
        values = codes[..., ::2] | codes[..., 1::2] << 4
        fp4 = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        numbers = fp4 if case.format == "mxfp4" else codes - (spread(zeros) if case.zero_points else 8.0)
    if case.format == "mxfp4":
        scales = rng.integers(122, 126, blocks, np.uint8)
        factors = scales.view(ml_dtypes.float8_e8m0fnu)
    else:
        factors = scales = (rng.uniform(0.5, 1.5, blocks) / np.abs(numbers).max()).astype(case.scales)
    arrays = {"values": values, "scales": scales, "zero_points": zeros}
    arrays = {name: None if array is None else jnp.asarray(array) for name, array in arrays.items()}
    return QuantizedStack(**arrays, format=case.format, block=block), numbers * spread(factors)
