"""Packed numbers, their scales and zero points, one code after the other."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxmoe.kernels.grouped_matmul.quantized import QuantizedStack, decode_scales, dequantize

PAIRS = np.arange(256, dtype=np.uint8).reshape(256, 1)  # a byte is two numbers, the first in its low half
LOW_HIGH = np.stack([PAIRS[:, 0] & 0xF, PAIRS[:, 0] >> 4], axis=1)


def test_scales_of_mxfp4_are_powers_of_two_and_255_is_no_number():
    codes = jnp.arange(256, dtype=jnp.uint8).reshape(256, 1)
    stack = QuantizedStack(values=jnp.zeros((256, 16), jnp.uint8), scales=codes, format="mxfp4", block=(1, 32))
    scales = np.asarray(decode_scales(stack))[:, 0]
    expected = np.asarray(codes)[:, 0].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert np.isnan(scales[255])
    np.testing.assert_array_equal(scales.view(np.int32)[:255], expected.view(np.int32)[:255])


def test_both_numbers_of_a_byte_of_mxfp4():
    scales = jnp.full((256, 1), 128, jnp.uint8)
    stack = QuantizedStack(values=jnp.asarray(PAIRS), scales=scales, format="mxfp4", block=(1, 2))
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    expected = np.concatenate([numbers, -numbers])[LOW_HIGH] * 2
    np.testing.assert_array_equal(dequantize(stack), expected)


def test_integers_are_counted_from_their_zero_point():
    scales = jnp.full((256, 1), 0.5, jnp.float32)
    plain = QuantizedStack(values=jnp.asarray(PAIRS), scales=scales, format="int4", block=(1, 2))
    np.testing.assert_array_equal(dequantize(plain), (LOW_HIGH.astype(np.float32) - 8) / 2)
    zeros = jnp.asarray(PAIRS % 16)
    moved = QuantizedStack(values=jnp.asarray(PAIRS), scales=scales, zero_points=zeros, format="int4", block=(1, 2))
    np.testing.assert_array_equal(dequantize(moved), (LOW_HIGH.astype(np.float32) - PAIRS % 16) / 2)
