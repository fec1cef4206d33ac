"""Tell a weight's format by its tensors alone: their names, dtypes and shapes."""

import math
from collections.abc import Mapping

from jaxmoe.quant.base import Part, QuantFormat, Shape, ceil_div
from jaxmoe.quant.formats import (
    AwqGemm,
    Bnb4Bit,
    BnbInt8,
    DeepSeekFp4,
    Fp8Block,
    Fp8Channel,
    Fp8Tensor,
    Gptq,
    IntQuantized,
    Mxfp4Blocks,
    Mxfp4Pack,
    Nvfp4,
    Nvfp4Pack,
    PackQuantized,
)
from jaxmoe.quant.weights import Header

PLAIN = frozenset({"BF16", "F16", "F32", "F64"})
"""Element types of weights that are not quantized."""

_FLOAT8_SCALES = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")


def infer_format(weight: str, headers: Mapping[str, Header]) -> QuantFormat | None:
    """The format that the tensors of a weight are in, None where they are plain or of no kind that is known.

    Settings that tensors do not tell are the usual ones: of GPTQ the first version, of packed integers 4 bits.

    Args:
        weight: name of the plain tensor.
        headers: headers of all tensors, by name.
    """

    def find(*suffixes: str) -> Header | None:
        names = [module + suffix for suffix in suffixes] if module else Part("", suffixes, ()).names(weight)
        return next((headers[name] for name in names if name in headers), None)

    # The usual name, for which a part has the names that `Part.names` would make.
    module = weight.removesuffix(".weight") if weight.endswith(".weight") else None

    packed, scale = find(".weight_packed"), find(".weight_scale")
    if packed is not None and scale is not None and len(packed.shape) > 1:
        return _packed(packed, scale, find(".weight_global_scale") is not None)
    words, scales = find(".qweight"), find(".scales")
    if words is not None and scales is not None and len(words.shape) == len(scales.shape) == 2:
        return _words(words.shape, scales.shape)
    if find(".blocks") is not None and scales is not None:
        return Mxfp4Blocks()
    values = find(".weight")
    for kind in ("nf4", "fp4"):
        # Its bytes may be those of a plain dtype.
        if find(f".weight.quant_state.bitsandbytes__{kind}") is not None:
            return Bnb4Bit(kind)
    if values is None or values.dtype_name in PLAIN or len(values.shape) < 2:
        return None
    if values.dtype_name == "U8" and find(".weight_scale_2") is not None:
        return Nvfp4()
    if values.dtype_name == "I8" and find(".SCB") is not None:
        return BnbInt8()
    grid = find(*_FLOAT8_SCALES)
    if grid is None:
        return None
    if values.dtype_name in ("I8", "U8") and grid.dtype_name in ("F8_E8M0", "U8"):
        return DeepSeekFp4()
    if values.dtype_name == "I8":
        return IntQuantized(_group(values.shape[-1], grid.shape))
    return _float8(values.shape, grid) if values.dtype_name.startswith("F8_") else None


def _packed(packed: Header, scale: Header, global_scale: bool) -> QuantFormat:
    if packed.dtype_name == "I32":
        return PackQuantized(4, _group(8 * packed.shape[-1], scale.shape))
    return Nvfp4Pack() if global_scale else Mxfp4Pack()


def _group(inputs: int, grid: Shape) -> int | None:
    """The size of a group of inputs by the shape of their scales; None for one of all."""
    groups = grid[-1] if len(grid) > 1 else 1
    return None if groups in (0, 1) else max(inputs // groups, 1)


def _words(words: Shape, scales: Shape) -> QuantFormat | None:
    groups = max(scales[0], 1)
    if words[1] == scales[1]:
        inputs = 8 * words[0]
        return Gptq(4, None if groups == 1 else inputs // groups)
    return AwqGemm(None if groups == 1 else words[0] // groups) if 8 * words[1] == scales[1] else None


def _float8(shape: Shape, grid: Header) -> QuantFormat | None:
    *lead, N, K = shape
    if grid.name.endswith("_inv") and len(grid.shape) > 1:
        return Fp8Block()
    if math.prod(grid.shape) == 1 or grid.shape in (tuple(lead), (*lead, 1, 1)):
        return Fp8Tensor()
    if grid.shape in ((*lead, N), (*lead, N, 1)):
        return Fp8Channel()
    if len(grid.shape) < 2 or 0 in grid.shape:
        return None
    if grid.shape[-2:] == (N, ceil_div(K, 32)) and grid.dtype_name in ("U8", "F8_E8M0"):
        return Fp8Block((1, 32))
    return Fp8Block()
