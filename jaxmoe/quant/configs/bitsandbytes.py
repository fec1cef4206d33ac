"""bitsandbytes: 4 bits, nf4 or fp4, or 8-bit integers."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.activations import Activations
from jaxmoe.quant.base import QuantFormat
from jaxmoe.quant.configs import settings
from jaxmoe.quant.configs.settings import Block
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.formats import Bnb4Bit, BnbInt8
from jaxmoe.quant.names import Names
from jaxmoe.quant.rules import Rules


def read(block: Block, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """The rules of a block of this method, and notes."""
    four, eight = (block.get(key) or block.get("_" + key) for key in ("load_in_4bit", "load_in_8bit"))
    if bool(four) == bool(eight):
        raise QuantizationError("a quantization of bitsandbytes must say load_in_4bit or load_in_8bit, one of them")
    form: QuantFormat = BnbInt8(activations=Activations("int8 with a scale for each token, outliers apart"))
    if four:
        kind = block.get("bnb_4bit_quant_type") or "fp4"
        if kind not in ("nf4", "fp4"):
            raise settings.refuse("bnb_4bit_quant_type", kind, "nf4 and fp4")
        form = Bnb4Bit(kind)
    return Rules(ignored=Names(settings.names(block, "llm_int8_skip_modules")), default=form), []
