"""The forms in which quantized weights stay packed on devices."""

import dataclasses
import math
from typing import NamedTuple

import ml_dtypes
import numpy as np

PACKED_ROLES = ("values", "scale", "zero_point", "matrix_scale", "input_scale")
"""Arrays of a packed weight; every one has the first two."""

ROW_FORMS = {
    "fp8_token": "fp8 with a scale for each token",
    "fp8_block": "fp8 with a scale for each 128 inputs",
    "fp8_block_e8m0": "fp8 with a scale for each 128 inputs, a power of two",
    "fp8_static": "fp8 with the scales of the checkpoint",
    "int8_token": "int8 with a scale for each token",
    "int8_static": "int8 with the scales of the checkpoint",
}
"""Forms that the kernels round inputs to, by the names that `jaxmoe.kernels.grouped_matmul` has for them, in words."""


def is_static(form: str | None) -> bool:
    """Whether a form of inputs is one whose scales are given, one for each matrix."""
    return form is not None and form.endswith("_static")


OF_MATRICES = ("matrix_scale", "input_scale")
"""Those of these arrays that have one number for each matrix."""


class PackedDtype(NamedTuple):
    """The numbers of a packed form.

    Attributes:
        dtype: dtype of the array that holds them.
        per_byte: numbers in each of its elements.
    """

    dtype: np.dtype
    per_byte: int


PACKED_DTYPES: dict[str, PackedDtype] = {
    "float8_e4m3fn": PackedDtype(np.dtype(ml_dtypes.float8_e4m3fn), 1),
    "int8": PackedDtype(np.dtype(np.int8), 1),
    "int4": PackedDtype(np.dtype(np.uint8), 2),
    "mxfp4": PackedDtype(np.dtype(np.uint8), 2),
    "nvfp4": PackedDtype(np.dtype(np.uint8), 2),
}
"""Forms that the kernels multiply with, by the names that `jaxmoe.kernels.grouped_matmul` has for them."""


# Of a scale that is a power of two: an exponent of bfloat16 is as wide.
_SCALES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E8M0": "bfloat16", "U8": "bfloat16"}


def scale_dtype(stored: str) -> str:
    """The dtype in which scales of an element type of safetensors are held, with every value of it."""
    return _SCALES[stored]


@dataclasses.dataclass(frozen=True)
class Packing:
    """A packed form of matrices [..., N, K]: W = (decode(values) - zero_points) · scales · matrix_scales.

    Two 4-bit numbers share a byte along K, that of the lower k in the low half; codes of int4 are unsigned, and 8 stands
    for zero where there are no zero points.

    Attributes:
        format: name in `PACKED_DTYPES`.
        block: (outputs, inputs) that share a scale; None for all of them.
        scales: name of the dtype of the scales.
        zero_points: whether each block has a zero point.
        matrix_scales: whether each matrix has a scale of its own besides.
        activations: name in `ROW_FORMS` of the form that inputs are rounded to before a product; None leaves them as they
            are. Of static forms each matrix has the scale of its inputs besides.
    """

    format: str
    block: tuple[int | None, int | None]
    scales: str = "float32"
    zero_points: bool = False
    matrix_scales: bool = False
    activations: str | None = None

    @property
    def input_scales(self) -> bool:
        """Whether each matrix has a scale of its inputs."""
        return is_static(self.activations)

    @property
    def roles(self) -> tuple[str, ...]:
        """The arrays that there are, of `PACKED_ROLES`."""
        there = {
            "zero_point": self.zero_points,
            "matrix_scale": self.matrix_scales,
            "input_scale": self.input_scales,
        }
        return tuple(role for role in PACKED_ROLES if there.get(role, True))

    @property
    def per_byte(self) -> int:
        """Numbers in each element of the values."""
        return PACKED_DTYPES[self.format].per_byte

    def dtype(self, role: str) -> np.dtype:
        """The dtype of one of the arrays."""
        if role == "values":
            return PACKED_DTYPES[self.format].dtype
        # NumPy knows the names of its own dtypes alone.
        return np.dtype(
            {"scale": getattr(ml_dtypes, self.scales, self.scales), "zero_point": "uint8"}.get(role, "float32")
        )

    def units(self, role: str, shape: tuple[int, ...]) -> tuple[int, int]:
        """The outputs and inputs of matrices of a shape that an element of one of the arrays stands for."""
        if role == "values":
            return 1, self.per_byte
        if role in OF_MATRICES:
            return shape[-2], shape[-1]
        N, K = self.block
        return N or shape[-2], K or shape[-1]

    def bits_per_number(self, shape: tuple[int, ...]) -> float:
        """Bits that a number takes, those of its share of the scales included."""
        bits = 0.0
        for role in self.roles:
            N, K = self.units(role, shape)
            bits += 8 * self.dtype(role).itemsize / (N * K)
        return bits

    def cut(self, sizes: tuple[int, int]) -> "Packing":
        """The same in blocks that divide outputs and inputs of these sizes; a scale for all of a dim stays one.

        >>> Packing("float8_e4m3fn", (128, None)).cut((192, 64)).block
        (64, None)
        """
        block = [None if of is None else math.gcd(of, size) for of, size in zip(self.block, sizes, strict=True)]
        return dataclasses.replace(self, block=(block[0], block[1]))

    def describe(self) -> str:
        """The form in a few words.

        >>> Packing("int4", (1, 32), "bfloat16").describe(), Packing("float8_e4m3fn", (None, None)).describe()
        ('int4, bfloat16 scales of 1 x 32', 'float8_e4m3fn, float32 scales of whole matrices')
        >>> Packing("int8", (1, None), activations="int8_token").describe()
        'int8, float32 scales of 1 x all, inputs in int8 with a scale for each token'
        """
        if self.block == (None, None):
            of = "whole matrices"
        else:
            of = " x ".join("all" if size is None else str(size) for size in self.block)
        inputs = "" if self.activations is None else f", inputs in {ROW_FORMS[self.activations]}"
        return f"{self.format}, {self.scales} scales of {of}{inputs}"
