"""Encoders of MXFP4: e2m1 numbers with an exponent for each group of 32 inputs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmoe.quant.base import QuantFormat, Shape, whole
from jaxmoe.quant.codes import apply_grid
from jaxmoe.quant.encode.base import Encoder, largest
from jaxmoe.quant.encode.compressed import compressed_settings
from jaxmoe.quant.formats import Mxfp4Blocks, Mxfp4Pack

_GROUP = 32
_BIAS = 127


@dataclasses.dataclass(frozen=True)
class Mxfp4Encoder(Encoder):
    """Numbers nearest to W[n, k] / 2^e, e the least with which none of a group is above 6, the largest that there is."""

    @property
    def format(self) -> QuantFormat:
        return Mxfp4Pack(_GROUP)

    def dtypes(self, dtype: np.dtype) -> dict[str, np.dtype]:
        return {"values": np.dtype(np.uint8), "scale": np.dtype(np.uint8)}

    def check_shape(self, shape: Shape) -> str | None:
        if len(shape) >= 2 and shape[-1] % _GROUP:
            return f"groups of {_GROUP} inputs must divide the {shape[-1]} inputs of a matrix"
        return super().check_shape(shape)

    def tile(self, values: np.ndarray, scale_dtype: np.dtype) -> dict[str, np.ndarray]:
        mantissa, exponent = np.frexp(largest(values.reshape(len(values), -1, _GROUP), -1)[..., 0])
        # With a mantissa of 0.5 to 1 it is 4 to 8 at the lesser exponent.
        exponent = np.where(mantissa > 0.75, exponent - 2, exponent - 3)
        exponent = np.where(mantissa == 0, 0, np.clip(exponent, -_BIAS, _BIAS))
        numbers = values.copy()
        factor = np.ldexp(np.float32(1), -exponent)
        apply_grid(np.multiply, numbers, factor, whole(values.shape), (1, _GROUP))
        codes = _codes(numbers)
        return {"values": codes[:, 0::2] | codes[:, 1::2] << 4, "scale": (exponent + _BIAS).astype(np.uint8)}

    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        more = {"scale_dtype": "torch.uint8"}
        return compressed_settings("mxfp4-pack-quantized", 4, "float", _GROUP, ignored, **more)


@dataclasses.dataclass(frozen=True)
class GptOssEncoder(Mxfp4Encoder):
    """The same as gpt-oss has it: blocks of 16 bytes, all experts of a layer in one tensor, and nothing else."""

    stacks = True
    kinds = frozenset({"routed experts"})

    @property
    def format(self) -> QuantFormat:
        return Mxfp4Blocks()

    def tile(self, values: np.ndarray, scale_dtype: np.dtype) -> dict[str, np.ndarray]:
        found = super().tile(values, scale_dtype)
        return {**found, "values": found["values"].reshape(len(values), -1, _GROUP // 2)}

    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        return {"quant_method": "mxfp4", "modules_to_not_convert": list(ignored)}


def _codes(numbers: np.ndarray) -> np.ndarray:
    """Codes of the e2m1 numbers nearest to these, of two the even one, uint8.

    Codes 0 to 7 stand for 0, 0.5, 1, 1.5, 2, 3, 4 and 6: steps of a half, of one from 2 on and of two from 4 on, so that a
    number's place among them is the least of three straight lines.
    """
    size = np.abs(numbers)
    place = np.minimum(np.minimum(2 * size, size + 2), size / 2 + 4)
    return np.rint(place).astype(np.uint8) | np.signbit(numbers).astype(np.uint8) << 3
