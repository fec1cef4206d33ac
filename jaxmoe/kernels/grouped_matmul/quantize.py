"""Making packed stacks from plain matrices, on the devices that hold them.

Letters here, beside the common ones of docs/concepts/letters.md: N and K of a matrix [N, K], n and k of a block of it.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul.quantized import FORMATS, QuantizedStack

# The largest code of each format that has one besides its sign.
_LARGEST = {"float8_e4m3fn": 448, "int8": 127, "int4": 7}


def quantize(
    matrices: jax.Array, *, format: str, block: tuple[int, int], scales: DTypeLike = jnp.float32
) -> QuantizedStack:
    """Pack matrices, each number as the nearest that the scale of its block has.

    The scale of a block is its largest absolute value over the largest code (448, 127 or 7), and of "mxfp4" the least power
    of two with which none is above 6; of a block of zeros it is 1.

    Args:
        matrices: [..., N, K], finite.
        format: "float8_e4m3fn", "int8", "int4" or "mxfp4".
        block: (n, k), outputs and inputs that share a scale; they divide N and K.
        scales: dtype of the scales, of "mxfp4" uint8 whatever it says.

    Raises:
        ValueError: the format is none of those, or the block does not divide the matrices.

    >>> stack = quantize(jnp.array([[1.0, -2.0]]), format="int8", block=(1, 2))
    >>> stack.values.tolist(), round(float(stack.scales[0, 0]) * 127, 4)
    ([[64, -127]], 2.0)
    """
    if format not in (*_LARGEST, "mxfp4"):
        raise ValueError(f"matrices are packed as {', '.join(_LARGEST)} or mxfp4; got {format!r}")
    *lead, N, K = matrices.shape
    (n, k), per_byte = block, FORMATS[format].per_byte
    if N % n or K % k or k % per_byte:
        raise ValueError(f"a block of {block} must divide matrices of {N} by {K}, and be of whole bytes")
    numbers = matrices.astype(jnp.float32).reshape(*lead, N // n, n, K // k, k)
    largest = jnp.max(jnp.abs(numbers), axis=(-3, -1), keepdims=True)
    if format == "mxfp4":
        mantissa, exponent = jnp.frexp(largest)
        exponent = jnp.where(mantissa > 0.75, exponent - 2, exponent - 3)
        exponent = jnp.where(largest == 0, 0, jnp.clip(exponent, -127, 127))
        scale = (exponent + 127).astype(jnp.uint8)
        codes = _float4_codes(jnp.ldexp(numbers, -exponent))
    else:
        dtype = jnp.dtype(scales)
        # Of a constant XLA would multiply by the rounded inverse.
        code = jnp.where(largest < jnp.inf, jnp.float32(_LARGEST[format]), jnp.nan)
        scale = jnp.maximum((largest / code).astype(dtype), jnp.finfo(dtype).tiny)
        scale = jnp.where(largest == 0, jnp.ones((), dtype), scale)
        codes = numbers / scale.astype(jnp.float32)
        if format != "float8_e4m3fn":
            codes = jnp.clip(jnp.rint(codes), -_LARGEST[format], _LARGEST[format])
        if format == "int4":
            codes = codes + 8
    values = codes.reshape(matrices.shape).astype(FORMATS[format].dtype)
    if per_byte == 2:
        pairs = values.reshape(*lead, N, K // 2, 2)
        values = pairs[..., 0] | pairs[..., 1] << 4
    return QuantizedStack(
        values=values, scales=scale.reshape(*lead, N // n, K // k), format=format, block=(int(n), int(k))
    )


def _float4_codes(numbers: jax.Array) -> jax.Array:
    """Codes of the e2m1 numbers nearest to these, of two the even one.

    Codes 0 to 7 stand for 0, 0.5, 1, 1.5, 2, 3, 4 and 6: steps of a half, of one from 2 on and of two from 4 on, so that a
    number's place among them is the least of three straight lines.
    """
    size = jnp.abs(numbers)
    place = jnp.minimum(jnp.minimum(2 * size, size + 2), size / 2 + 4)
    return jnp.rint(place).astype(jnp.uint8) | jnp.signbit(numbers).astype(jnp.uint8) << 3
