"""Stacks of matrices that stay packed: 8-bit and 4-bit numbers with a scale for each block of them.

W = (decode(values) - zero_points) · scales · matrix_scales. Matrices are (out, in) as in torch; two 4-bit numbers share a
byte, the one of lower k in the low half. A loader brings a checkpoint's own packing into this form once; backends read it
as it is.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K], B bytes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul.row_loops import take_group, tied
from jaxmoe.numerics import int32


class Format(NamedTuple):
    """Form in which the numbers of a stack are stored.

    Attributes:
        dtype: dtype of `values`.
        per_byte: numbers in each byte.
        decode: function from codes, uint8, one for each number, to float32.
        zero: code that stands for zero where a stack has no zero points; None if codes have a sign of their own.
        scales: dtype of `scales`; None for any floating one.
    """

    dtype: jnp.dtype
    per_byte: int
    decode: Callable[[jax.Array], jax.Array]
    zero: int | None = None
    scales: jnp.dtype | None = None


def _decode_minifloat(codes: jax.Array, *, exponent_bits: int, mantissa_bits: int, bias: int) -> jax.Array:
    """sign · 2^(e - bias) · 1.m, or sign · 2^(1 - bias) · 0.m where e = 0: as a float16 with its fields, scaled.

    A conversion from float16 takes subnormal numbers for what they are, where arithmetic may take them for zeros, and is
    an instruction of its own on CPUs; XLA's conversion from float8 is a long way round, and a table is no faster.
    """
    codes = codes.astype(jnp.uint16)
    sign_at = exponent_bits + mantissa_bits
    bits = codes >> sign_at << 15 | (codes & (2**sign_at - 1)) << (10 - mantissa_bits)
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * 2.0 ** (15 - bias)


def _decode_float8(codes: jax.Array) -> jax.Array:
    """OCP e4m3fn: no infinities, and NaN where all other bits are set."""
    numbers = _decode_minifloat(codes, exponent_bits=4, mantissa_bits=3, bias=7)
    return jnp.where(codes & 0x7F == 0x7F, jnp.nan, numbers)


def _decode_float4(codes: jax.Array) -> jax.Array:
    """OCP e2m1: ±0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    return _decode_minifloat(codes, exponent_bits=2, mantissa_bits=1, bias=1)


def _decode_int4(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32)


def _decode_int8(codes: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)


FORMATS: dict[str, Format] = {
    "float8_e4m3fn": Format(jnp.dtype(jnp.float8_e4m3fn), 1, _decode_float8),
    "int4": Format(jnp.dtype(jnp.uint8), 2, _decode_int4, zero=8),
    "int8": Format(jnp.dtype(jnp.int8), 1, _decode_int8),
    # The element and block formats of OCP's "Microscaling Formats (MX)", version 1.0.
    "mxfp4": Format(jnp.dtype(jnp.uint8), 2, _decode_float4, scales=jnp.dtype(jnp.uint8)),
    # The same elements with finer scales, which one float32 a matrix brings into e4m3's range.
    "nvfp4": Format(jnp.dtype(jnp.uint8), 2, _decode_float4, scales=jnp.dtype(jnp.float8_e4m3fn)),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QuantizedStack:
    """A stack of packed matrices [..., N, K], with W = (decode(values) - zero_points) · (scales · matrix_scales).

    A pytree of its arrays: it goes through `jit`, `shard_map` and `device_put`, with a sharding for each array or one
    for all. Weights are constants: gradients with respect to them are zero. Only `format` and `block` are checked when
    it is made, for what JAX puts in place of arrays is not always one; what it is handed to calls `check`.

    Inside `shard_map` a device may hold a part of a single block, with that block's scale: `block` stays as it is. A cut
    inside one of several blocks wants smaller blocks, which divide what each device holds, with their scales repeated.

    Attributes:
        values: float8_e4m3fn or int8 [..., N, K], or uint8 [..., N, K/2] with the number of the even k in the low four bits.
        scales: [..., N/bn, K/bk], floating; of "nvfp4" float8_e4m3fn; of "mxfp4" uint8 exponents s (E8M0), for
            2^(s - 127), and 255 for NaN.
        zero_points: codes that stand for zero, uint8 of the shape of `scales`; of "int4" only, where None is 8.
        matrix_scales: float32 [...], one number a matrix, where None is 1; or [..., M], one for each of M equal parts of a
            matrix's outputs, as gate and up are that stand in one.
        format: name in `FORMATS`. Of "int4", codes are unsigned, 0 to 15.
        block: (bn, bk), outputs and inputs that share a scale: (128, 128), or (1, K) for a scale a channel, (N, K)
            for a scale a tensor, (1, 32) for groups of 32. bn divides N, and bk divides K.

    Raises:
        ValueError: no such format, or a block of other than two positive sizes.

    >>> byte, one = jnp.array([[0xAB]], jnp.uint8), jnp.array([[127]], jnp.uint8)
    >>> dequantize(QuantizedStack(values=byte, scales=one, format="mxfp4", block=(1, 2))).tolist()
    [[-1.5, -1.0]]
    """

    values: jax.Array
    scales: jax.Array
    zero_points: jax.Array | None = None
    matrix_scales: jax.Array | None = None
    format: str = dataclasses.field(metadata={"static": True})
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format must be one of {sorted(FORMATS)}; got {self.format!r}. Dequantize other formats.")
        if not (isinstance(self.block, tuple) and len(self.block) == 2 and min(self.block) > 0):
            raise ValueError(
                f"block must be a tuple of two positive sizes, outputs and inputs a scale; got {self.block!r}. Of a scale "
                "a channel it is (1, K), of a scale a tensor (N, K)."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K] of the matrices."""
        *lead, K = self.values.shape
        return (*lead, K * FORMATS[self.format].per_byte)

    @property
    def ndim(self) -> int:
        """Dimensions of `shape`."""
        return self.values.ndim

    def check(self, name: str = "the stack") -> None:
        """See that the arrays fit together.

        Args:
            name: name of the stack in a message.

        Raises:
            ValueError: a dtype or shape is not what format and block ask for.
        """
        form = FORMATS[self.format]
        self._check_dtype(f"values of {name}", self.values, form.dtype)
        self._check_dtype(f"scales of {name}", self.scales, form.scales)
        if self.ndim < 2:
            raise ValueError(f"{name} must hold matrices, [..., N, K]; got values of shape {self.values.shape}.")
        if 0 in self.shape:
            return
        *lead, N, K = self.shape
        # What a device holds of a larger block is one block.
        bn, bk = (size if of_block % size == 0 else of_block for of_block, size in zip(self.block, (N, K), strict=True))
        if N % bn or K % bk:
            raise ValueError(
                f"the block of {name}, {self.block}, must divide its matrices of {N} by {K}. Make blocks of "
                f"{(math.gcd(N, bn), math.gcd(K, bk))}, and repeat the scales for them."
            )
        expected = (*lead, N // bn, K // bk)
        if self.scales.shape != expected:
            raise ValueError(
                f"scales of {name} must have shape {expected}, one for each block of {self.block} in matrices of {N} by "
                f"{K}; got {self.scales.shape}. Reshape them, or name the block that they are for."
            )
        if self.zero_points is not None:
            if form.zero is None:
                raise ValueError(
                    f"zero_points of {name} must be None: numbers of {self.format} have a sign of their own."
                )
            self._check_dtype(f"zero_points of {name}", self.zero_points, jnp.dtype(jnp.uint8))
            if self.zero_points.shape != expected:
                raise ValueError(
                    f"zero_points of {name} must have the shape of its scales, {expected}; got {self.zero_points.shape}. "
                    "Unpack them, one a byte."
                )
        if self.matrix_scales is not None:
            self._check_matrix_scales(name, tuple(lead), N // bn)

    def _check_matrix_scales(self, name: str, lead: tuple[int, ...], rows: int) -> None:
        assert self.matrix_scales is not None
        shape = self.matrix_scales.shape
        if self.matrix_scales.dtype != jnp.float32:
            raise ValueError(
                f"matrix_scales of {name} must be float32; got {self.matrix_scales.dtype}. Convert with astype."
            )
        parts = shape[-1] if len(shape) > len(lead) else 1
        if shape not in (lead, (*lead, parts)) or parts == 0 or rows % parts:
            raise ValueError(
                f"matrix_scales of {name} must have shape {lead}, one number a matrix, or one dim more, of a number that "
                f"divides its {rows} rows of blocks; got {shape}. Reshape them."
            )

    def _check_dtype(self, name: str, array: jax.Array, expected: jnp.dtype | None) -> None:
        if expected is None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be floating point for {self.format}; got {array.dtype}. Convert with astype."
            )
        if expected is not None and array.dtype != expected:
            raise ValueError(f"{name} must be {expected} for {self.format}; got {array.dtype}. View the bytes as that.")


# What backends multiply with: [G, N, K] either way.
Matrices = jax.Array | QuantizedStack


def dequantize(stack: QuantizedStack, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """The matrices [..., N, K] themselves: decoded and scaled in float32, then rounded to `dtype`.

    What is below float32's normal numbers may come out as zero.

    Raises:
        ValueError: the stack's arrays do not fit together, see `QuantizedStack.check`.
    """
    stack.check()
    if 0 in stack.shape:
        return jnp.zeros(stack.shape, dtype)
    *lead, N, K = stack.shape
    rows, columns = stack.scales.shape[-2:]
    blocks = FORMATS[stack.format].decode(_codes(stack)).reshape(*lead, rows, N // rows, columns, K // columns)
    scales, zeros = decode_scales(stack), decode_zeros(stack)
    if zeros is not None:
        blocks = blocks - zeros[..., :, None, :, None]
    return (blocks * scales[..., :, None, :, None]).reshape(stack.shape).astype(dtype)


def _codes(stack: QuantizedStack) -> jax.Array:
    """The codes of a stack in order, uint8 [..., N, K]."""
    values = lax.bitcast_convert_type(stack.values, jnp.uint8)
    if FORMATS[stack.format].per_byte == 1:
        return values
    # A byte's two codes as the two bytes of a uint16: XLA for CPU is slow in putting two arrays together.
    pairs = values.astype(jnp.uint16)
    return lax.bitcast_convert_type(pairs & 0xF | (pairs & 0xF0) << 4, jnp.uint8).reshape(stack.shape)


def split_bytes(name: str, values: jax.Array) -> list[jax.Array]:
    """The codes in bytes of a format: the first of each byte, then the second if there are two; uint8 of their shape."""
    return [values] if FORMATS[name].per_byte == 1 else [values & 0xF, values >> 4]


def decode_scales(stack: QuantizedStack) -> jax.Array:
    """scales · matrix_scales, float32 of the shape of `scales`."""
    scales = _decode_block_scales(stack.scales)
    if stack.matrix_scales is None:
        return scales
    factors = stack.matrix_scales
    if factors.ndim == scales.ndim - 2:
        factors = factors[..., None]
    return scales * jnp.repeat(factors, scales.shape[-2] // factors.shape[-1], axis=-1)[..., None]


def _decode_block_scales(scales: jax.Array) -> jax.Array:
    if scales.dtype == jnp.float8_e4m3fn:
        return _decode_float8(lax.bitcast_convert_type(scales, jnp.uint8))
    if scales.dtype != jnp.uint8:
        return scales.astype(jnp.float32)
    exponents = scales.astype(jnp.int32)
    # Put where float32 has its own exponent; 2^-127 is subnormal there, and what would be infinity is NaN.
    bits = jnp.where(exponents == 0, 1 << 22, exponents << 23)
    return jnp.where(exponents == 255, jnp.nan, lax.bitcast_convert_type(bits, jnp.float32))


def decode_zeros(stack: QuantizedStack) -> jax.Array | None:
    """Numbers to subtract from decoded codes, float32 of the shape of `scales`; None where codes have signs."""
    if stack.zero_points is not None:
        return stack.zero_points.astype(jnp.float32)
    zero = FORMATS[stack.format].zero
    return None if zero is None else jnp.full(stack.scales.shape, zero, jnp.float32)


def as_matrices(stack: Matrices) -> Matrices:
    """A stack [G, ..., N, K] as [G, ...·N, K], what backends get; if packed, with the block that divides what is held here.

    Its `matrix_scales`, if any, are [G, M], for M equal parts of the outputs.
    """
    G = stack.shape[0]
    if not isinstance(stack, QuantizedStack):
        return stack.reshape(G, math.prod(stack.shape[1:-1]), stack.shape[-1])

    def flatten(array: jax.Array) -> jax.Array:
        return lax.stop_gradient(array.reshape(G, math.prod(array.shape[1:-1]), array.shape[-1]))

    factors = stack.matrix_scales
    if factors is not None:
        factors = lax.stop_gradient(factors.reshape(G, math.prod(factors.shape[1:])))
    flat = jax.tree.map(flatten, dataclasses.replace(stack, matrix_scales=None))
    flat = dataclasses.replace(flat, matrix_scales=factors)
    bn, bk = (size // max(blocks, 1) for size, blocks in zip(flat.shape[1:], flat.scales.shape[1:], strict=True))
    return dataclasses.replace(flat, block=(max(bn, 1), max(bk, 1)))


def matrix_of(stack: QuantizedStack, group: jax.Array) -> QuantizedStack:
    """The matrix [N, K] of one group of a stack [G, N, K], still packed; for use inside a loop over groups."""
    values = bytes_of(stack, group, 0, stack.values.shape[2])
    scales, zero_points, matrix_scales = jax.tree.map(
        lambda array: _take_group(array, group), (stack.scales, stack.zero_points, stack.matrix_scales)
    )
    return dataclasses.replace(
        stack,
        values=lax.bitcast_convert_type(values, stack.values.dtype),
        scales=scales,
        zero_points=zero_points,
        matrix_scales=matrix_scales,
    )


def _take_group(array: jax.Array, group: jax.Array) -> jax.Array:
    """`take_group`, of a float8 array by its bytes; see `bytes_of`."""
    if array.dtype != jnp.float8_e4m3fn:
        return take_group(array, group)
    return lax.bitcast_convert_type(take_group(lax.bitcast_convert_type(array, jnp.uint8), group), array.dtype)


def bytes_of(stack: QuantizedStack, group: jax.Array, first: int | jax.Array, count: int) -> jax.Array:
    """uint8 [N, count]: `count` columns of bytes from `first` on, of the values of one group.

    XLA for CPU turns a float8 array to float16 before it slices it; its bytes it slices as they are. Tied, it does not
    take the bytes of the whole stack ahead of a loop over groups or columns.
    """
    first = jnp.int32(first)
    bytes_GNB = lax.bitcast_convert_type(tied(stack.values, (group, first)), jnp.uint8)
    return lax.dynamic_slice(bytes_GNB, int32(group, 0, first), (1, stack.shape[1], count))[0]
