"""Encoders of symmetric integers with a scale for each group of inputs or each output, for compressed-tensors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.quant.base import QuantFormat, Shape
from jaxmoe.quant.encode.base import Encoder, largest
from jaxmoe.quant.encode.compressed import compressed_settings
from jaxmoe.quant.encode.fp8_block import scales_of
from jaxmoe.quant.formats import PackQuantized
from jaxmoe.quant.grid import groups_of


@dataclasses.dataclass(frozen=True)
class IntEncoder(Encoder):
    """Codes nearest to W[n, k] / scale, from -m to m = 2^(bits - 1) - 1, and a scale of max |W| / m for each group.

    Scales are bfloat16 where values are, else float32, and are rounded before values are divided by them.

    Attributes:
        bits: bits of a code, 4 or 8.
        group_size: inputs that share a scale; None for all of an output's.
    """

    bits: int
    group_size: int | None = None

    @property
    def format(self) -> QuantFormat:
        return PackQuantized(self.bits, self.group_size)

    def dtypes(self, dtype: np.dtype) -> dict[str, np.dtype]:
        brief = np.dtype(ml_dtypes.bfloat16)
        return {"values": np.dtype(np.int32), "scale": brief if dtype == brief else np.dtype(np.float32)}

    def check_shape(self, shape: Shape) -> str | None:
        # The format has room for fewer inputs than a group, and for words that are not full; not every reader does.
        unit = self.group_size or 32 // self.bits
        if len(shape) >= 2 and shape[-1] % unit:
            what = "groups" if self.group_size else "words"
            return f"{what} of {unit} inputs must divide the {shape[-1]} inputs of a matrix"
        return super().check_shape(shape)

    def tile(self, values: np.ndarray, scale_dtype: np.dtype) -> dict[str, np.ndarray]:
        n, K = values.shape
        most = 2 ** (self.bits - 1) - 1
        grouped = values.reshape(n, groups_of(self.group_size, K), -1)
        scale = scales_of(largest(grouped, -1), np.float32(most), scale_dtype)
        codes = np.rint(grouped / scale.astype(np.float32))
        np.clip(codes, -most, most, out=codes)
        codes += most + 1
        fields = codes.astype(np.uint8).reshape(n, K)
        stream = fields if self.bits == 8 else fields[:, 0::2] | fields[:, 1::2] << 4
        return {"values": stream.view("<i4"), "scale": scale[..., 0]}

    def extras(self, shape: Shape) -> dict[str, np.ndarray]:
        return {"shape": np.array(shape, np.int64)}

    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        return compressed_settings("pack-quantized", self.bits, "int", self.group_size, ignored)
