"""Integers of 2 to 8 bits packed in words by compressed-tensors, pack-quantized: Kimi-K2 Thinking and K2.5."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from jaxmoe.quant.base import Arrays, Box, Part, Shape, Shapes, ceil_div, scale_of_activations
from jaxmoe.quant.codes import apply_groups, check_groups, words_to_float32
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.grid import GridFormat, check_group_size, group_block, groups_of
from jaxmoe.quant.packing import Packing, scale_dtype


@dataclasses.dataclass(frozen=True)
class PackQuantized(GridFormat):
    """W[n, k] = (code[n, k] - zero_point[n, g]) · scale[n, g], g = k // group_size, or g_idx[k] where that is stored.

    A code c stands for c - 2^(bits - 1); so does a zero point, and both cancel. Codes follow one another along K, lowest
    bits first; zero points along N. Of widths that do not divide a word, older writers left bits of a word unused, and
    newer ones let a code straddle two: the width of the tensor tells which.

    Attributes:
        bits: bits of a code.
        group_size: inputs that share a scale; None where the scale is of a channel.
    """

    bits: int = 4
    group_size: int | None = None

    name = "pack_quantized"
    parts = (
        Part("values", (".weight_packed",), ("I32",)),
        Part("scale", (".weight_scale",), ("BF16", "F16", "F32")),
        Part("zero_point", (".weight_zero_point",), ("I32",), required=False),
        Part("g_idx", (".weight_g_idx",), ("I32", "I64"), required=False),
        # What it says is in the shapes of the others; only of odd widths it is not.
        Part("shape", (".weight_shape",), ("I64", "I32"), required=False, decoded=False),
        scale_of_activations(".input_scale"),
    )

    def shapes(self, role: str, shape: Shape) -> tuple[Shape, ...]:
        *lead, N, K = shape
        groups = groups_of(self.group_size, K)
        if role == "g_idx":
            return ((K,),)
        if role == "scale":
            return ((*lead, N, groups),)
        if role == "zero_point":
            return tuple((*lead, words, groups) for words in self._words(N))
        return tuple((*lead, N, words) for words in self._words(K))

    def _words(self, codes: int) -> tuple[int, ...]:
        """Words for so many codes: densely packed, and with unused bits if that is another number."""
        dense, padded = ceil_div(codes * self.bits, 32), ceil_div(codes, 32 // self.bits)
        return (dense, padded) if dense != padded else (dense,)

    def shape_of(self, stored: Shapes) -> Shape | None:
        *lead, N, words = stored["values"]
        if self.group_size is not None and len(stored["scale"]) == len(stored["values"]):
            # Groups tell the inputs exactly, where words may have room for more.
            inputs = stored["scale"][-1] * self.group_size
            if words in self._words(inputs):
                return (*lead, N, inputs)
        return (*lead, N, words * (32 // self.bits)) if 32 % self.bits == 0 else None

    def check_shape(self, shape: Shape) -> str | None:
        return super().check_shape(shape) or check_group_size(self.group_size, shape)

    def _dense(self, shape: Shape, stored: Shapes) -> bool:
        """Whether codes lie in two words where they must; of tensors that are as wide either way, that is supposed."""
        counts = [(shape[-1], stored["values"][-1])]
        counts += [(shape[-2], stored["zero_point"][-2])] if "zero_point" in stored else []
        told = [words == self._words(codes)[0] for codes, words in counts if len(self._words(codes)) > 1]
        return all(told)

    def _unit(self, shape: Shape, stored: Shapes) -> tuple[int, int]:
        """The least number of codes that fill whole words, and how many words that is."""
        if not self._dense(shape, stored):
            return 32 // self.bits, 1
        together = math.lcm(self.bits, 32)
        return together // self.bits, together // 32

    def _word_range(self, codes: tuple[int, int], words: int, unit: tuple[int, int]) -> tuple[int, int]:
        """The range of words that hold a range of codes, from a code that starts a word on."""
        return codes[0] // unit[0] * unit[1], min(ceil_div(codes[1], unit[0]) * unit[1], words)

    def value_box(self, box: Box, shape: Shape, stored: Shapes) -> Box:
        return (*box[:-1], self._word_range(box[-1], stored["values"][-1], self._unit(shape, stored)))

    def boxes(self, box: Box, shape: Shape, stored: Shapes) -> dict[str, Box]:
        found = super().boxes(box, shape, stored)
        if "g_idx" in stored:
            found["g_idx"] = (box[-1],)
            found["scale"] = (*found["scale"][:-1], (0, stored["scale"][-1]))
        if "zero_point" in stored:
            rows = self._word_range(box[-2], stored["zero_point"][-2], self._unit(shape, stored))
            found["zero_point"] = (*found["scale"][:-2], rows, found["scale"][-1])
        return found

    def codes(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        return self._signed(array, box[-1], shape, stored, out)

    def _signed(
        self, words: np.ndarray, codes: tuple[int, int], shape: Shape, stored: Shapes, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Codes of a range that these words hold, less their offset, as float32 [..., codes]."""
        numbers = words_to_float32(words, self.bits, out, straddling=self._dense(shape, stored))
        first = codes[0] % self._unit(shape, stored)[0]
        return numbers[..., first : first + codes[1] - codes[0]]

    def zero_point(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray | None:
        if "zero_point" not in arrays:
            return None
        zeros = self._signed(np.swapaxes(arrays["zero_point"], -1, -2), box[-2], shape, stored)
        return np.swapaxes(zeros, -1, -2)

    def packing(self, dtypes: Mapping[str, str], shape: Shape) -> Packing | None:
        zeros = "zero_point" in dtypes
        if "g_idx" in dtypes or self.bits not in (4, 8) or (zeros and self.bits == 8):
            return None
        scales, block = scale_dtype(dtypes["scale"]), group_block(self.group_size, shape)
        return Packing("int4" if self.bits == 4 else "int8", block, scales, zero_points=zeros)

    def values_as_stored(self, shape: Shape) -> bool:
        return self.bits == 4 and shape[-1] % 8 == 0

    def packed_values(self, array: np.ndarray, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        per_byte = 8 // self.bits
        first = box[-1][0] % (32 // self.bits) // per_byte
        stream = np.ascontiguousarray(array).view(np.uint8)
        stream = stream[..., first : first + (box[-1][1] - box[-1][0]) // per_byte]
        # What is one more than half of a byte's range stands for one: less the half, it is a byte with a sign.
        return stream if self.bits == 4 else (stream ^ np.uint8(0x80)).view(np.int8)

    def packed(self, role: str, arrays: Arrays, box: Box, shape: Shape, stored: Shapes) -> np.ndarray:
        if role != "zero_point":
            return super().packed(role, arrays, box, shape, stored)
        zeros = self.zero_point(arrays, box, shape, stored)
        assert zeros is not None
        return (zeros + 2 ** (self.bits - 1)).astype(np.uint8)

    def values(self, arrays: Arrays, box: Box, shape: Shape, stored: Shapes, out: np.ndarray) -> np.ndarray:
        if "g_idx" not in arrays:
            return super().values(arrays, box, shape, stored, out)
        if len(shape) > 2:
            raise QuantizationError(f"weight_g_idx is of a matrix; this weight has shape {shape}")
        groups = arrays["g_idx"]
        size = shape[-1] // stored["scale"][-1]
        # Of an order that was not changed some writers say -1 throughout.
        if np.all(groups == -1):
            groups = np.arange(*box[-1]) // size
        check_groups(groups, stored["scale"][-1], "weight_g_idx")
        numbers = self.codes(arrays["values"], box, shape, stored, out)
        zeros = self.zero_point(arrays, box, shape, stored)
        if zeros is not None:
            apply_groups(np.subtract, numbers, zeros, groups, size)
        apply_groups(np.multiply, numbers, self.scale(arrays, shape), groups, size)
        return numbers
