"""Quantized weights of published checkpoints: their settings, their tensors, and their values. NumPy alone.

`find_quantization` reads settings, `match_tensors` holds them against the headers of a checkpoint, and each
`QuantizedWeight` says which parts of its stored tensors a box of it needs, and decodes these.
"""

from jaxmoe.quant.base import Part, QuantFormat
from jaxmoe.quant.detect import SIDE_FILES, find_quantization, find_settings, read_quantization, read_side_files
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.formats import FORMATS
from jaxmoe.quant.match import MatchedTensors, match_tensors
from jaxmoe.quant.rules import Quantization, Rules
from jaxmoe.quant.weights import Header, QuantizedWeight

__all__ = [
    "FORMATS",
    "SIDE_FILES",
    "Header",
    "MatchedTensors",
    "Part",
    "QuantFormat",
    "Quantization",
    "QuantizationError",
    "QuantizedWeight",
    "Rules",
    "find_quantization",
    "find_settings",
    "match_tensors",
    "read_quantization",
    "read_side_files",
]
