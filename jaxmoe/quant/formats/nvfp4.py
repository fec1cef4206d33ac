"""NVFP4 as ModelOpt writes it: the scale of the tensor, weight_scale_2, multiplies."""

import dataclasses

from jaxmoe.quant.base import Part, scale_of_activations
from jaxmoe.quant.float4 import Nvfp4Groups


@dataclasses.dataclass(frozen=True)
class Nvfp4(Nvfp4Groups):
    """W[n, k] = e2m1[n, k] · (weight_scale[n, k // 16] · weight_scale_2).

    Attributes:
        group_size: inputs that share a scale.
    """

    group_size: int = 16

    name = "nvfp4"
    parts = (
        Part("values", (".weight",), ("U8",)),
        Part("scale", (".weight_scale",), ("F8_E4M3",)),
        Part("global_scale", (".weight_scale_2",), ("F32",)),
        scale_of_activations(".input_scale"),
    )
