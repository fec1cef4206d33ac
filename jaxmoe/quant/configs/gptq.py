"""GPTQ, in config.json or quantize_config.json: one setting for all layers, with exceptions in `dynamic`."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.base import QuantFormat
from jaxmoe.quant.configs import settings
from jaxmoe.quant.configs.settings import Block
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.formats import Gptq
from jaxmoe.quant.formats.gptq import BITS
from jaxmoe.quant.names import Names
from jaxmoe.quant.rules import Rules

_VERSIONS = {"gptq": 1, "gptq_v2": 2}


def read(block: Block, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """The rules of a block of this method, and notes."""
    layout = block.get("checkpoint_format") or block.get("format") or "gptq"
    if not isinstance(layout, str) or layout not in _VERSIONS:
        raise settings.refuse("checkpoint_format", layout, " and ".join(_VERSIONS))
    if block.get("pack_dtype", "int32") not in ("int32", None):
        raise settings.refuse("pack_dtype", block["pack_dtype"], "int32")
    default = _format_of(block, _VERSIONS[layout])
    groups: list[tuple[Names, QuantFormat | None]] = []
    for pattern, changed in settings.table(block, "dynamic").items():
        names = Names(["re:" + pattern.removeprefix("-:").removeprefix("+:")])
        if pattern.startswith("-:"):
            groups.append((names, None))
            continue
        if not isinstance(changed, dict):
            raise QuantizationError(f"dynamic must say an object for {pattern!r:.80}; it says {changed!r:.40}")
        groups.append((names, _format_of({**block, **changed}, _VERSIONS[layout])))
    chosen = settings.names(block, "modules_in_block_to_quantize")
    if not chosen:
        head = block.get("lm_head") is True
        return Rules(groups=tuple(groups), default=default, head=head), []
    # Lists of modules that are quantized one after another.
    flat = [name for entry in chosen for name in (entry if isinstance(entry, list) else [entry])]
    return Rules(groups=(*groups, (Names(flat), default))), []


def _format_of(block: Block, version: int) -> Gptq:
    bits = settings.whole(block, "bits", default=4)
    if bits not in BITS:
        raise settings.refuse("bits", bits, f"{BITS} of GPTQ")
    size = settings.group_size(block, "group_size", default=128)
    return Gptq(bits, size, version, act_order=block.get("desc_act") is True)
