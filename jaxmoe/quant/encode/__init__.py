"""Encoders, which make the arrays of a quantized format from plain values; a new one is a file and a line here."""

from jaxmoe.quant.encode.base import Encoder
from jaxmoe.quant.encode.errors import ErrorSum, QuantizationLoss
from jaxmoe.quant.encode.fp8_block import Fp8BlockEncoder
from jaxmoe.quant.encode.integers import IntEncoder
from jaxmoe.quant.encode.mxfp4 import GptOssEncoder, Mxfp4Encoder

TARGETS: dict[str, Encoder] = {
    "fp8_block": Fp8BlockEncoder(),
    "int8": IntEncoder(8),
    "int4_group": IntEncoder(4, 32),
    "int4_group_128": IntEncoder(4, 128),
    "mxfp4": Mxfp4Encoder(),
}
"""Name for users -> encoder."""

STACKED: dict[tuple[str, str], Encoder] = {("gpt_oss", "mxfp4"): GptOssEncoder()}
"""(model_type, name for users) -> encoder of families that have a form of their own for all experts in one tensor."""

__all__ = ["STACKED", "TARGETS", "Encoder", "ErrorSum", "GptOssEncoder", "IntEncoder", "QuantizationLoss"]
