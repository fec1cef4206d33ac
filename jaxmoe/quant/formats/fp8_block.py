"""8-bit floats with a scale for each block of 128 by 128: DeepSeek-V3, Qwen3 FP8, MiniMax-M2; MXFP8 has blocks of 32."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, Shape, Shapes, ceil_div, scale_of_activations
from jaxmoe.quant.codes import exponents_to_float32, to_float32
from jaxmoe.quant.grid import GridFormat
from jaxmoe.quant.packing import Packing, scale_dtype

FLOAT8 = ("F8_E4M3", "F8_E5M2")


@dataclasses.dataclass(frozen=True)
class Fp8Block(GridFormat):
    """W[n, k] = weight[n, k] · scale[n // bn, k // bk]; "weight_scale_inv" multiplies, whatever its name says.

    Blocks at the edges may be partial. Scales are floats, or powers of two as E8M0.

    Attributes:
        block_size: (bn, bk), outputs and inputs of a block.
    """

    block_size: tuple[int, int] = (128, 128)

    name = "fp8_block"
    parts = (
        Part("values", (".weight",), FLOAT8),
        Part(
            "scale",
            (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight"),
            ("F32", "BF16", "F16", "F8_E8M0", "U8"),
        ),
        scale_of_activations(".input_scale", ".activation_scale", ".qscale_act"),
    )

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        if role == "values":
            return (shape,)
        *lead, N, K = shape
        rows, columns = ceil_div(N, self.block_size[0]), ceil_div(K, self.block_size[1])
        # ModelOpt keeps the dims that its blocks were reduced over.
        return ((*lead, rows, columns), *([(rows, 1, columns, 1)] if not lead else []))

    def shape_of(self, stored: Shapes) -> Shape:
        return stored["values"]

    def block(self, shape: Shape, grid: Shape) -> tuple[int, ...]:
        return (*super().block(shape, grid)[:-2], *self.block_size)

    def value_box(self, box: Box, shape: Shape, stored: Shapes) -> Box:
        return box

    def codes(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        return to_float32(array, out)

    def scale(self, arrays: Arrays, shape: Shape) -> np.ndarray:
        return exponents_to_float32(arrays["scale"])

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        if dtypes["values"] != "F8_E4M3":
            return None
        return Packing("float8_e4m3fn", self.block_size, scale_dtype(dtypes["scale"]))

    def packed_grid(self, role: str, array: np.ndarray) -> np.ndarray:
        return exponents_to_float32(array)

    def scales(self, arrays: Arrays) -> dict[str, np.ndarray]:
        return {role: exponents_to_float32(array) for role, array in super().scales(arrays).items()}
