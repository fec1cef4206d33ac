"""Readers of quantization blocks, one file a method; a new one is one file and one line here."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.quant.configs import (
    awq,
    bitsandbytes,
    compressed_tensors,
    fbgemm_fp8,
    fp8,
    gptq,
    modelopt,
    mxfp4,
)
from jaxmoe.quant.rules import Rules

Reader = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Rules, list[str]]]

READERS: dict[str, Reader] = {
    "fp8": fp8.read,
    "compressed-tensors": compressed_tensors.read,
    "compressed_tensors": compressed_tensors.read,
    "modelopt": modelopt.read,
    "modelopt_fp4": modelopt.read,
    "modelopt_mixed": modelopt.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "mxfp4": mxfp4.read,
    "fbgemm_fp8": fbgemm_fp8.read,
    "bitsandbytes": bitsandbytes.read,
}
"""Name in `quant_method` -> reader of the block, given the config that it stands in too."""

__all__ = ["READERS", "Reader"]
