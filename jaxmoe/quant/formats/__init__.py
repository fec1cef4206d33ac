"""Quantized formats, one a file; a new one is one file and one line here.

Names are those of reports and messages, not of configs: `jaxmoe.quant.configs` reads these.
"""

from jaxmoe.quant.base import QuantFormat
from jaxmoe.quant.formats.awq import AwqGemm
from jaxmoe.quant.formats.bnb_4bit import Bnb4Bit
from jaxmoe.quant.formats.bnb_int8 import BnbInt8
from jaxmoe.quant.formats.deepseek_fp4 import DeepSeekFp4
from jaxmoe.quant.formats.fbgemm_fp8 import FbgemmFp8
from jaxmoe.quant.formats.fp8_block import Fp8Block
from jaxmoe.quant.formats.fp8_channel import Fp8Channel
from jaxmoe.quant.formats.fp8_tensor import Fp8Tensor
from jaxmoe.quant.formats.gptq import Gptq
from jaxmoe.quant.formats.int_quantized import IntQuantized
from jaxmoe.quant.formats.mxfp4_blocks import Mxfp4Blocks
from jaxmoe.quant.formats.mxfp4_pack import Mxfp4Pack
from jaxmoe.quant.formats.nvfp4 import Nvfp4
from jaxmoe.quant.formats.nvfp4_pack import Nvfp4Pack
from jaxmoe.quant.formats.pack_quantized import PackQuantized

FORMATS: dict[str, type[QuantFormat]] = {
    one.name: one
    for one in (
        Fp8Block,
        Fp8Tensor,
        Fp8Channel,
        FbgemmFp8,
        IntQuantized,
        PackQuantized,
        Nvfp4Pack,
        Mxfp4Pack,
        Gptq,
        AwqGemm,
        Mxfp4Blocks,
        DeepSeekFp4,
        Nvfp4,
        Bnb4Bit,
        BnbInt8,
    )
}

__all__ = [
    "FORMATS",
    "AwqGemm",
    "Bnb4Bit",
    "BnbInt8",
    "DeepSeekFp4",
    "FbgemmFp8",
    "Fp8Block",
    "Fp8Channel",
    "Fp8Tensor",
    "Gptq",
    "IntQuantized",
    "Mxfp4Blocks",
    "Mxfp4Pack",
    "Nvfp4",
    "Nvfp4Pack",
    "PackQuantized",
]
