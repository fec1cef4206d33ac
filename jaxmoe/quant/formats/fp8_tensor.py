"""8-bit floats with one scale a tensor: ModelOpt's FP8, AutoFP8, compressed-tensors' float-quantized of a tensor."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxmoe.quant.base import Box, Part, Shape, Shapes, scale_of_activations
from jaxmoe.quant.codes import to_float32
from jaxmoe.quant.formats.fp8_block import FLOAT8
from jaxmoe.quant.grid import GridFormat
from jaxmoe.quant.packing import Packing, scale_dtype

FLOAT8_PARTS = (
    Part("values", (".weight",), FLOAT8),
    Part("scale", (".weight_scale", ".weight_scale_inv", ".scale", ".qscale_weight"), ("F32", "BF16", "F16")),
    scale_of_activations(".input_scale", ".activation_scale", ".qscale_act"),
)


@dataclasses.dataclass(frozen=True)
class Fp8Tensor(GridFormat):
    """W = weight · scale; of a stack [E, N, K] the scale is one number, or one for each matrix."""

    name = "fp8_tensor"
    parts = FLOAT8_PARTS

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        if role == "values":
            return (shape,)
        lead = shape[:-2]
        stacks = [lead, (*lead, 1), (*lead, 1, 1)] if lead else [(1, 1)]
        return ((), (1,), *stacks)

    def shape_of(self, stored: Shapes) -> Shape:
        return stored["values"]

    def value_box(self, box: Box, shape: Shape, stored: Shapes) -> Box:
        return box

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        if dtypes["values"] != "F8_E4M3":
            return None
        return Packing("float8_e4m3fn", self.packed_block(shape), scale_dtype(dtypes["scale"]))

    def packed_block(self, shape: Shape) -> tuple[int | None, int | None]:
        """The outputs and inputs that share a scale, None for all."""
        return None, None

    def codes(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        return to_float32(array, out)
