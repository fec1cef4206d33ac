"""compressed-tensors, which llm-compressor and others write: groups of modules, each with a format and its sizes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.activations import of_arguments
from jaxmoe.quant.base import QuantFormat
from jaxmoe.quant.configs import settings
from jaxmoe.quant.configs.settings import Block
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.formats import (
    Fp8Block,
    Fp8Channel,
    Fp8Tensor,
    IntQuantized,
    Mxfp4Pack,
    Nvfp4Pack,
    PackQuantized,
)
from jaxmoe.quant.names import Names
from jaxmoe.quant.rules import Rules

_KNOWN = (
    "int-quantized, float-quantized, naive-quantized, pack-quantized, nvfp4-pack-quantized, mxfp4-pack-quantized, "
    "mxfp8-quantized and mixed-precision of them"
)


def read(block: Block, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """The rules of a block of this method, and notes."""
    _check_others(block)
    groups: list[tuple[Names, QuantFormat | None]] = []
    default: QuantFormat | None = None
    notes = settings.cache_note(block)
    for name, group in settings.table(block, "config_groups").items():
        if not isinstance(group, dict):
            raise QuantizationError(f"config_groups must say an object for {name!r}; it says {group!r:.40}")
        form = _format_of(group, block)
        if form is not None:
            form = dataclasses.replace(form, activations=of_arguments(settings.table(group, "input_activations")))
        targets = settings.names(group, "targets") or ["Linear"]
        if "Linear" in targets:
            default = default or form
        classes = [target for target in targets if _is_class(target) and target != "Linear"]
        if classes:
            notes.append(f"targets {classes} of {name} are classes of modules: their tensors tell which these are")
        named = [target for target in targets if not _is_class(target)]
        if named:
            groups.append((Names(named), form))
    if default is None and not groups:
        raise QuantizationError("config_groups must name a format for targets; there is none in them")
    ignored = Names(settings.names(block, "ignore"))
    return Rules(ignored=ignored, groups=tuple(groups), default=default, head=True), notes


def _check_others(block: Block) -> None:
    sparsity = settings.table(block, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise settings.refuse("sparsity_config's format", sparsity, "weights that are not sparse")
    if settings.table(block, "transform_config").get("config_groups"):
        raise QuantizationError(
            "transform_config rotates the inputs of layers, which jaxmoe does not: take a release without it"
        )


def _is_class(target: Any) -> bool:
    """Whether a target is a class of modules: these begin with a capital, and names of modules do not."""
    return isinstance(target, str) and target[:1].isupper()


def _format_of(group: Block, block: Block) -> QuantFormat | None:
    weights = settings.table(group, "weights")
    if not weights:
        return None
    named = group.get("format") or block.get("format")
    bits, kind = settings.whole(weights, "num_bits", default=8), weights.get("type", "int")
    size = settings.group_size(weights, "group_size")
    # Older files leave it out where the group's size tells it.
    strategy = weights.get("strategy") or ("tensor" if size is None else "group")
    if named in (None, "mixed-precision"):
        named = _usual_format(bits, kind, size)
    if named == "dense":
        return None
    if named == "pack-quantized":
        if kind != "int" or bits is None or not 2 <= bits <= 8:
            raise settings.refuse("pack-quantized with weights of", f"{bits} bits, {kind}", "integers of 2 to 8 bits")
        return PackQuantized(bits, size if strategy == "group" else None)
    if named == "nvfp4-pack-quantized":
        return Nvfp4Pack(size or 16)
    if named == "mxfp4-pack-quantized":
        return Mxfp4Pack(size or 32)
    if named == "mxfp8-quantized":
        return Fp8Block((1, size or 32))
    if named in ("float-quantized", "naive-quantized", "int-quantized") and bits == 8:
        return _eight_bits(kind, strategy, size, weights)
    raise settings.refuse("format", named, f"{_KNOWN} of compressed-tensors")


def _eight_bits(kind: str, strategy: str, size: int | None, weights: Block) -> QuantFormat:
    if kind == "int":
        return IntQuantized(size if strategy == "group" else None)
    if strategy == "block":
        return Fp8Block(settings.pair(weights, "block_structure") or (128, 128))
    if strategy == "group" and size is not None:
        return Fp8Block((1, size))
    if strategy not in ("tensor", "channel"):
        raise settings.refuse("strategy", strategy, "tensor, channel, group and block for 8-bit floats")
    return Fp8Channel() if strategy == "channel" else Fp8Tensor()


def _usual_format(bits: int | None, kind: str, size: int | None) -> str:
    """The format that the library writes for a group that names none."""
    if kind == "float" and bits == 4:
        return "nvfp4-pack-quantized" if size == 16 else "mxfp4-pack-quantized"
    if bits == 8:
        return "float-quantized" if kind == "float" else "int-quantized"
    return "pack-quantized"
