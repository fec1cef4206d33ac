"""AWQ, in config.json or quant_config.json."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.configs import settings
from jaxmoe.quant.configs.settings import Block
from jaxmoe.quant.formats import AwqGemm
from jaxmoe.quant.names import Names
from jaxmoe.quant.rules import Rules


def read(block: Block, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """The rules of a block of this method, and notes."""
    version = str(block.get("version") or "gemm").lower()
    if version != "gemm":
        raise settings.refuse("version", version, "gemm of AWQ")
    bits = settings.whole(block, "bits", "w_bit", default=4)
    if bits != 4:
        raise settings.refuse("bits", bits, "4 bits of AWQ")
    if block.get("zero_point", True) is not True:
        raise settings.refuse("zero_point", block["zero_point"], "AWQ with zero points")
    form = AwqGemm(settings.group_size(block, "group_size", "q_group_size", default=128))
    return Rules(ignored=Names(settings.names(block, "modules_to_not_convert")), default=form), []
