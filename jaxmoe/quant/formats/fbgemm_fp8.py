"""8-bit floats of FBGEMM, with a scale for each output: Llama 4's FP8 release and Llama 3.1's."""

import dataclasses

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, Shape, Shapes
from jaxmoe.quant.codes import to_float32
from jaxmoe.quant.formats.fp8_block import FLOAT8
from jaxmoe.quant.formats.fp8_channel import Fp8Channel


@dataclasses.dataclass(frozen=True)
class FbgemmFp8(Fp8Channel):
    """W[n, k] = weight[n, k] · scale[n] of a linear layer; a stack of experts is [E, K, N], outputs last.

    The scales of such a stack are [E, 1, N] or [E, N, 1]: of outputs in either spelling.
    """

    name = "fbgemm_fp8"
    parts = (
        Part("values", (".weight",), FLOAT8),
        Part("scale", (".weight_scale",), ("F32", "BF16", "F16")),
        Part("input_scale", (".input_scale_ub",), ("F32",), required=False, decoded=False),
    )

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        if role == "values" or len(shape) == 2:
            return super().shapes(role, shape)
        *lead, _, N = shape
        return ((*lead, 1, N), (*lead, N, 1))

    def grid_box(self, box: Box, shape: Shape, stored: Shape) -> Box:
        if len(shape) == 2:
            return super().grid_box(box, shape, stored)
        *lead, _, outputs = box
        return (*lead, (0, 1), outputs) if stored[-2] == 1 else (*lead, outputs, (0, 1))

    def packed_block(self, shape: Shape) -> tuple[int | None, int | None]:
        return (1, None) if len(shape) == 2 else (None, 1)

    def packed(self, role: str, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        if len(shape) == 2 or role == "values":
            return super().packed(role, arrays, box, shape, stored)
        scale = arrays["scale"]
        return scale.reshape(*scale.shape[:-2], 1, -1)

    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        if len(shape) == 2:
            return super().values(arrays, box, shape, stored, out)
        numbers, scale = to_float32(arrays["values"], out), to_float32(arrays["scale"])
        numbers *= scale.reshape(*scale.shape[:-2], 1, -1)
        return numbers
