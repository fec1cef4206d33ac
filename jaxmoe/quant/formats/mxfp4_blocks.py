"""MXFP4 of gpt-oss: blocks of 16 bytes and their exponents, for stacks of experts."""

import dataclasses

import numpy as np

from jaxmoe.quant.base import Box, Part, Shape, Shapes, ceil_div
from jaxmoe.quant.codes import FLOAT4, nibbles_to_float32
from jaxmoe.quant.float4 import Mxfp4Groups

_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Mxfp4Blocks(Mxfp4Groups):
    """W[e, n, k] = e2m1 number k % 32 of blocks[e, n, k // 32] · 2^(scales[e, n, k // 32] - 127).

    Byte j of a block has number 2j in its low half. The plain tensor of the same name is [E, K, N], as transformers has
    it. The two parts are `NAME_blocks` and `NAME_scales`, or `NAME.blocks` and `NAME.scales`.
    """

    group_size = _BLOCK
    transposed = True
    name = "mxfp4"
    parts = (Part("values", (".blocks",), ("U8",)), Part("scale", (".scales",), ("U8", "F8_E8M0")))

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        *lead, K = shape
        groups = (*lead, K // _BLOCK)
        return (groups,) if role == "scale" else ((*groups, _BLOCK // 2), (*lead, K // 2))

    def shape_of(self, stored: Shapes) -> Shape | None:
        if len(stored["scale"]) < 2:
            return None
        *lead, groups = stored["scale"]
        return (*lead, groups * _BLOCK)

    def value_box(self, box: Box, shape: Shape, stored: Shapes) -> Box:
        if len(stored["values"]) == len(shape):
            return super().value_box(box, shape, stored)
        *lead, (start, stop) = box
        return (*lead, (start // _BLOCK, ceil_div(stop, _BLOCK)), (0, _BLOCK // 2))

    def packed_values(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        if array.ndim == len(shape):
            return super().packed_values(array, box, shape, stored)
        start, stop = box[-1]
        rows = array.reshape(*array.shape[:-2], -1)
        return rows[..., start % _BLOCK // 2 : (start % _BLOCK + stop - start) // 2]

    def codes(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        if array.ndim == len(shape):
            return super().codes(array, box, shape, stored, out)
        start, stop = box[-1]
        numbers = nibbles_to_float32(array.reshape(*array.shape[:-2], -1), FLOAT4, out)
        return numbers[..., start % _BLOCK : start % _BLOCK + stop - start]
