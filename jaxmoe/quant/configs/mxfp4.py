"""`quant_method: mxfp4` of gpt-oss: experts alone."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.configs import settings
from jaxmoe.quant.configs.settings import Block
from jaxmoe.quant.formats import Mxfp4Blocks
from jaxmoe.quant.names import EXPERTS, Names
from jaxmoe.quant.rules import Rules


def read(block: Block, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """The rules of a block of this method, and notes."""
    ignored = Names(settings.names(block, "modules_to_not_convert"))
    return Rules(ignored=ignored, groups=((Names([EXPERTS]), Mxfp4Blocks()),)), []
