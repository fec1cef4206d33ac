"""Compiled steps of models whose weights stay packed: the bytes that they take, and what they must not make."""

import math
import re
from collections import Counter

import jax.numpy as jnp

from jaxmoe.config import DecoderConfig, MoEConfig
from jaxmoe.planning.memory import Plan
from jaxmoe.planning.steps import CompiledStep

MB = 2**20
# Views of the arguments cost nothing.
VIEWS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "opt-barrier"}
_PARAMETER = re.compile(r" = (?P<dtype>\w+)\[(?P<dims>[\d,]*)\]\S* parameter\(")
_NAMES = {
    "f8e4m3fn": "float8_e4m3fn",
    "bf16": "bfloat16",
    "f32": "float32",
    "u8": "uint8",
    "s32": "int32",
    "pred": "bool",
}


def check_arguments(step: CompiledStep, planned: Plan) -> None:
    """The program takes the very bytes that the plan counts, and a few integers besides."""
    found: Counter[str] = Counter()
    for parameter in _PARAMETER.finditer(step.text[step.text.index("\nENTRY ") :]):
        dtype = jnp.dtype(_NAMES[parameter["dtype"]])
        found[dtype.name] += math.prod(map(int, filter(None, parameter["dims"].split(",")))) * dtype.itemsize
    integers = found.pop("int32") + found.pop("bool", 0)
    assert planned.held_bytes == found.total()
    assert integers < MB
    assert 0 <= step.argument_bytes - found.total() - integers < MB


def check_nothing_is_decoded(step: CompiledStep, config: DecoderConfig, devices: int) -> None:
    """No instruction makes an array of as many numbers as a device has in a layer's stack of experts."""
    moe = config.layers[-1].feed_forward
    assert isinstance(moe, MoEConfig)
    numbers = moe.num_experts // devices * moe.hidden_size * moe.moe_intermediate_size
    # The head is plain, and read by a fusion that widens what it has read.
    head = config.vocab_size, config.hidden_size
    made = {op for op, shape in step.arrays if math.prod(shape) >= numbers and shape != head}
    assert made <= VIEWS
    assert step.temp_bytes < numbers * 2
