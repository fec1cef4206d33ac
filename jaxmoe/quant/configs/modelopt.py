"""ModelOpt, in config.json or in hf_quant_config.json: one algorithm for all linear layers, or one for each."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.activations import Activations, blocks_of
from jaxmoe.quant.base import QuantFormat
from jaxmoe.quant.configs import settings
from jaxmoe.quant.configs.settings import Block
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.formats import Fp8Block, Fp8Channel, Fp8Tensor, Nvfp4
from jaxmoe.quant.names import Names
from jaxmoe.quant.rules import Rules

_MIXED = "MIXED_PRECISION"
_FLOAT8: dict[str, QuantFormat] = {
    "FP8": Fp8Tensor(activations=Activations.of("fp8_static")),
    "FP8_PER_CHANNEL_PER_TOKEN": Fp8Channel(activations=Activations.of("fp8_token")),
    "FP8_PB_WO": Fp8Block(),
    "FP8_BLOCK_SCALES": Fp8Block(activations=blocks_of(128)),
    "MXFP8": Fp8Block((1, 32), activations=blocks_of(32, powers=True)),
}
_NVFP4 = {
    "NVFP4": Activations("4-bit floats in groups of 16, with the scales of the checkpoint"),
    "W4A16_NVFP4": None,
    "W4A8_NVFP4_FP8": Activations.of("fp8_static"),
}
# These divide a layer's inputs by factors of their own, pre_quant_scale.
_RESCALED = ("NVFP4_AWQ", "W4A8_AWQ", "W4A16_AWQ", "INT4_AWQ", "NVFP4_SVDQUANT", "INT8_SQ", "W8A8_SQ_PER_CHANNEL")


def read(block: Block, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """The rules of a block of this method, and notes."""
    ignored = Names(settings.names(block, "ignore", "exclude_modules"))
    algorithm = block.get("quant_algo")
    default = None if algorithm == _MIXED else format_of(algorithm, block)
    modules = layers(block)
    if algorithm == _MIXED and not modules:
        raise QuantizationError(f"quant_algo {_MIXED} needs quantized_layers, the algorithm of each; it has none")
    return Rules(ignored=ignored, modules=modules, default=default), settings.cache_note(block)


def layers(block: Block) -> dict[str, QuantFormat]:
    """The formats of `quantized_layers`, by module."""
    found = {}
    for module, layer in settings.table(block, "quantized_layers").items():
        if not isinstance(layer, dict):
            raise QuantizationError(f"quantized_layers must say an object for {module!r}; it says {layer!r:.40}")
        found[module] = format_of(layer.get("quant_algo"), {**block, **layer})
    return found


def format_of(algorithm: Any, block: Block) -> QuantFormat:
    """The format of an algorithm of ModelOpt's.

    Raises:
        QuantizationError: it is another.
    """
    if isinstance(algorithm, str) and algorithm in _NVFP4:
        size = settings.group_size(block, "group_size", default=16) or 16
        return Nvfp4(size, activations=_NVFP4[algorithm])
    if algorithm in _RESCALED:
        raise QuantizationError(
            f"quant_algo {algorithm!r} rescales the inputs of its layers (pre_quant_scale), which jaxmoe does not: take an "
            f"export in {', '.join([*_FLOAT8, *_NVFP4])}, or the bfloat16 release"
        )
    if not isinstance(algorithm, str) or algorithm not in _FLOAT8:
        raise settings.refuse("quant_algo", algorithm, ", ".join([*_FLOAT8, *_NVFP4, _MIXED]))
    return _FLOAT8[algorithm]
