"""`quant_method: fbgemm_fp8` of Llama 4 and Llama 3.1."""

from collections.abc import Mapping
from typing import Any

from jaxmoe.quant.activations import Activations
from jaxmoe.quant.configs import settings
from jaxmoe.quant.configs.settings import Block
from jaxmoe.quant.formats import FbgemmFp8
from jaxmoe.quant.names import Names
from jaxmoe.quant.rules import Rules

_BOUNDED = Activations("fp8 with a scale for each token, up to an upper bound")


def read(block: Block, config: Mapping[str, Any]) -> tuple[Rules, list[str]]:
    """The rules of a block of this method, and notes."""
    return Rules(
        ignored=Names(settings.names(block, "modules_to_not_convert")), default=FbgemmFp8(activations=_BOUNDED)
    ), []
