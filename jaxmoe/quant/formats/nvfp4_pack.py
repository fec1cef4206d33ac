"""NVFP4 as compressed-tensors packs it, nvfp4-pack-quantized: weight_global_scale divides."""

import dataclasses

import numpy as np

from jaxmoe.quant.base import Part, scale_of_activations
from jaxmoe.quant.float4 import Nvfp4Groups


@dataclasses.dataclass(frozen=True)
class Nvfp4Pack(Nvfp4Groups):
    """W[n, k] = e2m1[n, k] · (weight_scale[n, k // 16] / weight_global_scale).

    Attributes:
        group_size: inputs that share a scale.
    """

    group_size: int = 16

    name = "nvfp4_pack"
    parts = (
        Part("values", (".weight_packed",), ("U8",)),
        Part("scale", (".weight_scale",), ("F8_E4M3",)),
        Part("global_scale", (".weight_global_scale",), ("F32",)),
        scale_of_activations(".input_global_scale", ".input_scale"),
    )

    def rescale(self, scale: np.ndarray | np.float32, global_scale: np.ndarray) -> np.ndarray:
        return scale / global_scale
