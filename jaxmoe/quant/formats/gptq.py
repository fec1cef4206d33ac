"""GPTQ: integers of 2, 3, 4 or 8 bits packed along the inputs, with a zero point and a scale for each group of inputs."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, QuantFormat, Shape, Shapes, ceil_div
from jaxmoe.quant.codes import apply_grid, check_groups, codes_to_float32, put_columns, to_float32
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.grid import check_group_size, group_block, groups_of
from jaxmoe.quant.packing import Packing, scale_dtype
from jaxmoe.quant.words import transpose_words, unpack_columns, unpack_words

BITS = (2, 3, 4, 8)


@dataclasses.dataclass(frozen=True)
class Gptq(QuantFormat):
    """W[n, k] = scales[g, n] · (code[k, n] - zero[g, n]), g = g_idx[k] or k // group_size.

    Codes follow one another along k, lowest bits first, and zero points along n. The first version stores a zero point
    less one, in as many bits: what is stored as 2^bits - 1 is zero.

    Attributes:
        bits: bits of a code.
        group_size: inputs that share a scale; None where all of an output do.
        version: version of the format, 1 or 2.
        act_order: whether inputs are of groups in another order than their own.
    """

    bits: int = 4
    group_size: int | None = None
    version: int = 1
    act_order: bool = False

    name = "gptq"
    ranks = range(2, 3)
    packed_from: ClassVar[Mapping[str, tuple[str, ...]]] = {**QuantFormat.packed_from, "scale": ("scale", "g_idx")}
    parts = (
        Part("values", (".qweight",), ("I32",)),
        Part("zero_point", (".qzeros",), ("I32",)),
        Part("scale", (".scales",), ("F16", "BF16", "F32")),
        Part("g_idx", (".g_idx",), ("I32", "I64"), required=False),
    )

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        N, K = shape
        groups = groups_of(self.group_size, K)
        return {
            "values": ((K * self.bits // 32, N),),
            "zero_point": ((groups, N * self.bits // 32),),
            "scale": ((groups, N),),
            "g_idx": ((K,),),
        }[role]

    def shape_of(self, stored: Shapes) -> Shape:
        words, N = stored["values"]
        return N, words * 32 // self.bits

    def check_shape(self, shape: Shape) -> str | None:
        if len(shape) != 2:
            return f"{self.name} holds a matrix; this weight has shape {shape}"
        if any(size * self.bits % 32 for size in shape):
            return f"codes of {self.bits} bits do not fill words of 32 bits along both dims of {shape}"
        return check_group_size(self.group_size, shape)

    def _unit(self) -> tuple[int, int]:
        """Codes that fill whole words, and how many words that is."""
        return (32, 3) if self.bits == 3 else (32 // self.bits, 1)

    def _word_range(self, start: int, stop: int) -> tuple[int, int]:
        codes, words = self._unit()
        return start // codes * words, ceil_div(stop, codes) * words

    def boxes(self, box: Box, shape: Shape, stored: Shapes) -> dict[str, Box]:
        rows, columns = box
        size = self.group_size or shape[1]
        groups = (columns[0] // size, ceil_div(columns[1], size))
        found: dict[str, Box] = {}
        if "g_idx" in stored:
            # An input may be of any group.
            found["g_idx"], groups = (columns,), (0, stored["scale"][0])
        return found | {
            "values": (self._word_range(*columns), rows),
            "zero_point": (groups, self._word_range(*rows)),
            "scale": (groups, rows),
        }

    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        (row, row_end), (column, column_end) = box
        size = self.group_size or shape[1]
        zeros, scales = self._zeros(arrays["zero_point"], row, row_end), to_float32(arrays["scale"])
        if "g_idx" in arrays:
            check_groups(arrays["g_idx"], len(scales), "g_idx")
            if not self._in_order(arrays["g_idx"], column, size):
                return self._reordered(arrays["values"], zeros, scales, arrays["g_idx"], column, out)
            groups = slice(column // size, ceil_div(column_end, size))
            zeros, scales = zeros[groups], scales[groups]
        # Words transposed have the codes of an output in order.
        codes = self._own(unpack_words(transpose_words(arrays["values"]), self.bits), column, column_end)
        numbers = codes_to_float32(codes, self.bits, np.ascontiguousarray(zeros.T), box, (1, size), out)
        apply_grid(np.multiply, numbers, np.ascontiguousarray(scales.T), box, (1, size))
        return numbers

    def _reordered(
        self, words: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray, start: int, out: np.ndarray
    ) -> np.ndarray:
        # Inputs by outputs, as words and grids are stored, a group is of whole rows.
        codes = self._own(unpack_columns(words, self.bits).T, start, start + len(groups)).T
        put_columns(out, codes, zeros, scales, groups)
        return out

    def _in_order(self, groups: np.ndarray, start: int, size: int) -> bool:
        """Whether inputs from `start` on are of groups in their own order."""
        return np.array_equal(groups, np.arange(start, start + len(groups)) // size)

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        if self.bits != 4 or self.act_order:
            return None
        scales = scale_dtype(dtypes["scale"])
        return Packing("int4", group_block(self.group_size, shape), scales, zero_points=True)

    def packed(self, role: str, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        (row, row_end), (column, column_end) = box
        if role == "values":
            first = column % 8 // 2
            return transpose_words(arrays["values"]).view(np.uint8)[:, first : first + (column_end - column) // 2]
        size = self.group_size or shape[1]
        # Beside an order of inputs all groups are read.
        groups = slice(column // size, ceil_div(column_end, size)) if "g_idx" in stored else slice(None)
        if role == "zero_point":
            return self._zeros(arrays["zero_point"][groups], row, row_end).T
        if "g_idx" in arrays and not self._in_order(arrays["g_idx"], column, size):
            raise QuantizationError(
                "g_idx must have inputs in the order of their groups where desc_act is false; it has another order; decode "
                'the weights instead, with quantized="dequantize"'
            )
        return arrays["scale"][groups].T

    def _zeros(self, words: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Zero points of a range of outputs, uint8 [groups, outputs]."""
        codes = unpack_words(words, self.bits)
        if self.version == 1:
            codes = (codes + np.uint8(1)) & np.uint8(2**self.bits - 1)
        return self._own(codes, start, stop)

    def _own(self, codes: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Codes from `start` to `stop`, of those along the last dim that fill whole words around them."""
        first = start % self._unit()[0]
        return codes[..., first : first + stop - start]
