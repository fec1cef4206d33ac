"""Encoder of 8-bit floats with a scale for each block of 128 by 128, as DeepSeek-V3 and Qwen3 FP8 are published."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.quant.base import QuantFormat, whole
from jaxmoe.quant.codes import apply_grid
from jaxmoe.quant.encode.base import Encoder
from jaxmoe.quant.formats import Fp8Block

_SIDE = 128
_LARGEST = np.float32(448)


@dataclasses.dataclass(frozen=True)
class Fp8BlockEncoder(Encoder):
    """e4m3, nearest to W[n, k] / scale, and a float32 scale of max |W| / 448 for each block; blocks may be partial."""

    rows = _SIDE

    @property
    def format(self) -> QuantFormat:
        return Fp8Block((_SIDE, _SIDE))

    def dtypes(self, dtype: np.dtype) -> dict[str, np.dtype]:
        return {"values": np.dtype(ml_dtypes.float8_e4m3fn), "scale": np.dtype(np.float32)}

    def tile(self, values: np.ndarray, scale_dtype: np.dtype) -> dict[str, np.ndarray]:
        n, K = values.shape
        # Along rows first, where neighbors in memory are of different columns.
        by_column = np.maximum.reduceat(np.abs(values), range(0, n, _SIDE), axis=0)
        scale = scales_of(np.maximum.reduceat(by_column, range(0, K, _SIDE), axis=1), _LARGEST, scale_dtype)
        numbers = values.copy()
        apply_grid(np.divide, numbers, scale, whole(values.shape), (_SIDE, _SIDE))
        return {"values": numbers.astype(ml_dtypes.float8_e4m3fn), "scale": scale}

    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_SIDE, _SIDE],
            "modules_to_not_convert": list(ignored),
        }

    def static_settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        return self.settings(ignored) | {"activation_scheme": "static"}


def scales_of(largest: np.ndarray, code: np.ndarray | np.float32, dtype: np.dtype) -> np.ndarray:
    """The scales with which the largest values become the largest code; no scale is zero, whatever the values are."""
    smallest = ml_dtypes.finfo(dtype).smallest_normal
    scale = np.maximum((largest / code).astype(dtype), smallest)
    return np.where(largest == 0, np.ones((), dtype), scale)
