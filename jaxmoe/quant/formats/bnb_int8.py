"""8-bit integers of bitsandbytes, LLM.int8: a largest absolute value for each output."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, Shape, Shapes
from jaxmoe.quant.codes import not_zero, to_float32
from jaxmoe.quant.grid import GridFormat
from jaxmoe.quant.packing import Packing

# As bitsandbytes has it, so that the last bit agrees with it: a multiplication, not a division by 127.
_ONE_127TH = np.float32(7.874015718698502e-3)


@dataclasses.dataclass(frozen=True)
class BnbInt8(GridFormat):
    """W[n, k] = (weight[n, k] · SCB[n]) / 127."""

    name = "bnb_int8"
    ranks = range(2, 3)
    parts = (
        Part("values", (".weight",), ("I8",)),
        Part("scale", (".SCB",), ("F32", "F16", "BF16")),
        Part("layout", (".weight_format",), ("U8", "I64", "I32", "F32"), required=False, decoded=False),
    )

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        return (shape,) if role == "values" else ((shape[0],), (shape[0], 1))

    def shape_of(self, stored: Shapes) -> Shape:
        return stored["values"]

    def scales(self, arrays: Arrays) -> dict[str, np.ndarray]:
        # An output of zeros has SCB zero.
        return {role: not_zero(array) for role, array in super().scales(arrays).items()}

    def value_box(self, box: Box, shape: Shape, stored: Shapes) -> Box:
        return box

    def codes(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        return to_float32(array, out)

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        return Packing("int8", (1, None))

    def packed_grid(self, role: str, array: np.ndarray) -> np.ndarray:
        return to_float32(array) * _ONE_127TH

    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        numbers = super().values(arrays, box, shape, stored, out)
        numbers *= _ONE_127TH
        return numbers
