"""MXFP4 as compressed-tensors packs it, mxfp4-pack-quantized: Kimi-K3."""

import dataclasses

from jaxmoe.quant.base import Part, scale_of_activations
from jaxmoe.quant.float4 import Mxfp4Groups


@dataclasses.dataclass(frozen=True)
class Mxfp4Pack(Mxfp4Groups):
    """OCP's MXFP4: W[n, k] = e2m1[n, k] · 2^(weight_scale[n, k // 32] - 127).

    Attributes:
        group_size: inputs that share a scale.
    """

    group_size: int = 32

    name = "mxfp4_pack"
    parts = (
        Part("values", (".weight_packed",), ("U8",)),
        Part("scale", (".weight_scale",), ("U8", "F8_E8M0")),
        scale_of_activations(".input_scale", ".input_global_scale"),
    )
