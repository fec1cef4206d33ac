"""MXFP4 as DeepSeek-V4's routed experts have it, with `expert_dtype: fp4`."""

import dataclasses

from jaxmoe.quant.base import Part, scale_of_activations
from jaxmoe.quant.float4 import Mxfp4Groups


@dataclasses.dataclass(frozen=True)
class DeepSeekFp4(Mxfp4Groups):
    """OCP's MXFP4 beside fp8: W[n, k] = e2m1[n, k] · scale[n, k // 32], packed in int8, with scales E8M0.

    Attributes:
        group_size: inputs that share a scale.
    """

    group_size: int = 32

    name = "deepseek_fp4"
    parts = (
        Part("values", (".weight",), ("I8", "U8")),
        Part("scale", (".scale", ".weight_scale_inv", ".weight_scale"), ("F8_E8M0", "U8", "F32")),
        scale_of_activations(".input_scale", ".activation_scale"),
    )
