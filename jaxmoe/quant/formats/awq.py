"""AWQ in its GEMM layout: 4-bit integers packed along the outputs in an order of their own."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, QuantFormat, Shape, Shapes, ceil_div
from jaxmoe.quant.codes import apply_grid, codes_to_float32, to_float32
from jaxmoe.quant.grid import check_group_size, group_block, groups_of
from jaxmoe.quant.packing import Packing, scale_dtype
from jaxmoe.quant.words import transpose_nibbles, transpose_words, unpack_words

# The output, of eight, whose code is at place i of a word; and where each of them is.
_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclasses.dataclass(frozen=True)
class AwqGemm(QuantFormat):
    """W[n, k] = scales[g, n] · (code[k, n] - zero[g, n]), g = k // group_size.

    A word holds the codes of eight outputs: 0, 2, 4, 6, 1, 3, 5 and 7, from the lowest bits on.

    Attributes:
        group_size: inputs that share a scale; None where all of an output do.
    """

    group_size: int | None = 128

    name = "awq"
    ranks = range(2, 3)
    parts = (
        Part("values", (".qweight",), ("I32",)),
        Part("zero_point", (".qzeros",), ("I32",)),
        Part("scale", (".scales",), ("F16", "BF16", "F32")),
    )

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        N, K = shape
        groups = groups_of(self.group_size, K)
        return {"values": ((K, N // 8),), "zero_point": ((groups, N // 8),), "scale": ((groups, N),)}[role]

    def shape_of(self, stored: Shapes) -> Shape:
        K, words = stored["values"]
        return 8 * words, K

    def check_shape(self, shape: Shape) -> str | None:
        if len(shape) != 2:
            return f"{self.name} holds a matrix; this weight has shape {shape}"
        if shape[0] % 8:
            return f"{self.name} packs outputs by 8; these matrices have {shape[0]}"
        return check_group_size(self.group_size, shape)

    def boxes(self, box: Box, shape: Shape, stored: Shapes) -> dict[str, Box]:
        rows, columns = box
        size = self.group_size or shape[1]
        groups = (columns[0] // size, ceil_div(columns[1], size))
        words = (rows[0] // 8, ceil_div(rows[1], 8))
        return {"values": (columns, words), "zero_point": (groups, words), "scale": (groups, rows)}

    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        (row, row_end), (column, column_end) = box
        size = self.group_size or shape[1]
        codes = unpack_words(_by_output(arrays["values"]), 4)[row % 8 : row % 8 + row_end - row, : column_end - column]
        zeros = np.ascontiguousarray(_zeros(arrays["zero_point"], row, row_end))
        numbers = codes_to_float32(codes, 4, zeros, box, (1, size), out)
        apply_grid(np.multiply, numbers, np.ascontiguousarray(to_float32(arrays["scale"]).T), box, (1, size))
        return numbers

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        scales = scale_dtype(dtypes["scale"])
        return Packing("int4", group_block(self.group_size, shape), scales, zero_points=True)

    def packed(self, role: str, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        (row, row_end), (column, column_end) = box
        if role == "values":
            packed = _by_output(arrays["values"]).view(np.uint8)
            return packed[row % 8 : row % 8 + row_end - row, : (column_end - column) // 2]
        return _zeros(arrays["zero_point"], row, row_end) if role == "zero_point" else arrays["scale"].T


def _zeros(words: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Zero points of a range of outputs, uint8 [outputs, groups]."""
    zeros = unpack_words(words, 4)
    zeros = zeros.reshape(len(zeros), -1, 8)[..., _PLACES].reshape(zeros.shape)
    return zeros[:, start % 8 : start % 8 + stop - start].T


def _by_output(words_KN: np.ndarray) -> np.ndarray:
    """Codes of each output in order, in words: uint32 [N, K / 8], and more of K where it does not fill words.

    Words of eight outputs and one input become words of one output and eight inputs, which are then moved as wholes.
    """
    K, words = words_KN.shape
    padded = words_KN
    if K % 8:
        padded = np.zeros((ceil_div(K, 8) * 8, words), np.int32)
        padded[:K] = words_KN
    eights = transpose_words(padded).view(np.uint32).reshape(words, -1, 8)
    by_place = transpose_nibbles(np.moveaxis(eights, -1, 0))
    by_output = np.empty((words, 8, by_place.shape[-1]), np.uint32)
    for place, output in enumerate(_OUTPUTS):
        by_output[:, output] = by_place[place]
    return by_output.reshape(8 * words, -1)
