"""`quant_method: fp8`: DeepSeek, Qwen3, MiniMax; experts may be of another format, as in DeepSeek-V4 and exports of it."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.activations import Activations, blocks_of
from jaxmoe.quant.base import QuantFormat
from jaxmoe.quant.configs import modelopt, settings
from jaxmoe.quant.configs.settings import Block
from jaxmoe.quant.formats import DeepSeekFp4, Fp8Block, Fp8Tensor
from jaxmoe.quant.names import EXPERTS, Names
from jaxmoe.quant.rules import Rules

_ELEMENTS = (None, "e4m3", "float8_e4m3fn", "e5m2", "float8_e5m2")


def read(block: Block, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """The rules of a block of this method, and notes."""
    if block.get("fmt") not in _ELEMENTS:
        raise settings.refuse("fmt", block["fmt"], "e4m3 and e5m2 under quant_method fp8")
    if block.get("scale_fmt") not in (None, "float", "ue8m0"):
        raise settings.refuse("scale_fmt", block["scale_fmt"], "scales that are floats or ue8m0")
    size = settings.pair(block, "weight_block_size")
    inputs = _activations(block, size)
    default: QuantFormat = Fp8Tensor(activations=inputs) if size is None else Fp8Block(size, activations=inputs)
    notes = settings.cache_note(block)
    groups: list[tuple[Names, QuantFormat | None]] = []
    modules = modelopt.layers(block)
    ignored = settings.names(block, "modules_to_not_convert", "ignored_layers")
    expert_algo = block.get("moe_quant_algo")
    if expert_algo is not None and not modules:
        groups.append((Names([EXPERTS]), modelopt.format_of(expert_algo, block)))
    if modules or expert_algo is not None:
        # What that part of the export leaves alone is as the checkpoint was before: in fp8.
        notes.append("the ignore list is of the experts' own format; other modules are fp8 where their tensors are")
    expert_dtype = config.get("expert_dtype", block.get("expert_dtype"))
    if expert_dtype not in (None, "fp4", "fp8"):
        raise settings.refuse("expert_dtype", expert_dtype, "fp4 and fp8")
    if expert_dtype == "fp4":
        groups.append((Names([EXPERTS]), DeepSeekFp4(activations=inputs)))
    return Rules(ignored=Names(ignored), modules=modules, groups=tuple(groups), default=default), notes


def _activations(block: Block, size: tuple[int, int] | None) -> Activations | None:
    """The form of inputs, which is dynamic where nothing is said."""
    scheme = block.get("activation_scheme", "dynamic")
    if scheme is None:
        return None
    if scheme == "static":
        return Activations.of("fp8_static")
    if scheme != "dynamic":
        return Activations(f"fp8, activation_scheme {scheme!r:.40}")
    if size is None:
        return Activations.of("fp8_token")
    return blocks_of(size[1], powers=block.get("scale_fmt") == "ue8m0")
