"""LoRA adapters as PEFT saves them: their files, the tensors that they change, and the update of a part of a tensor."""

from jaxmoe.checkpoint.lora.adapter import Adapter, open_adapter
from jaxmoe.checkpoint.lora.factors import ParamFactors, factors_of_params
from jaxmoe.checkpoint.lora.match import find_updates
from jaxmoe.checkpoint.lora.update import LowRankUpdate, TensorDelta

__all__ = [
    "Adapter",
    "LowRankUpdate",
    "ParamFactors",
    "TensorDelta",
    "factors_of_params",
    "find_updates",
    "open_adapter",
]
