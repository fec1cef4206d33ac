"""8-bit integers of compressed-tensors, int-quantized or naive-quantized, with a scale a tensor, channel or group."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, Shape, Shapes, scale_of_activations
from jaxmoe.quant.codes import to_float32
from jaxmoe.quant.grid import GridFormat, check_group_size, grid_shape, group_block, groups_of
from jaxmoe.quant.packing import Packing, scale_dtype


@dataclasses.dataclass(frozen=True)
class IntQuantized(GridFormat):
    """W[n, k] = (weight[n, k] - zero_point[n, k // g]) · scale[n, k // g].

    Attributes:
        group_size: g, inputs that share a scale; None where the scale is of a channel or of the whole tensor.
    """

    group_size: int | None = None

    name = "int_quantized"
    parts = (
        Part("values", (".weight",), ("I8",)),
        Part("scale", (".weight_scale",), ("BF16", "F16", "F32")),
        Part("zero_point", (".weight_zero_point",), ("I8", "I32", "I64"), required=False),
        scale_of_activations(".input_scale"),
        Part("input_zero_point", (".input_zero_point",), ("I8", "I32", "I64"), required=False, decoded=False),
    )
    grids = ("scale", "zero_point")

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        if role == "values":
            return (shape,)
        *lead, K = shape
        if self.group_size is not None:
            return ((*lead, groups_of(self.group_size, K)),)
        return ((*lead, 1), tuple(lead), (), (1,))

    def shape_of(self, stored: Shapes) -> Shape:
        return stored["values"]

    def check_shape(self, shape: Shape) -> str | None:
        return super().check_shape(shape) or check_group_size(self.group_size, shape)

    def value_box(self, box: Box, shape: Shape, stored: Shapes) -> Box:
        return box

    def codes(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        return to_float32(array, out)

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        if "zero_point" in dtypes:
            return None
        return Packing("int8", group_block(self.group_size, shape), scale_dtype(dtypes["scale"]))

    def zero_point(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray | None:
        if "zero_point" not in arrays:
            return None
        zeros = to_float32(arrays["zero_point"])
        return zeros.reshape(grid_shape(zeros.shape, shape))
