"""The weights of a checkpoint as its files hold them, from config.json and the files beside it alone."""

import dataclasses
import math
from collections import Counter, defaultdict
from typing import Any

import jax.numpy as jnp

from jaxmoe.checkpoint.mapping import abstract_specs, is_expert_stack, written_blocks, written_form
from jaxmoe.config import DecoderConfig
from jaxmoe.models import Family
from jaxmoe.quant import Quantization

PLAIN = "plain"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """Formats and bytes of a checkpoint's weights, of the layers that a model needs.

    Attributes:
        formats: {part of the model: {format, or "plain": bytes}}; parts are those of `Plan.parts`.
        method: method of quantization, None where no file declares one.
    """

    formats: dict[str, dict[str, int]]
    method: str | None

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(sum(sizes.values()) for sizes in self.formats.values())

    def to_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        return dataclasses.asdict(self) | {"bytes": self.nbytes}


def stored_weights(family: Family, config: DecoderConfig, quantization: Quantization | None) -> StoredWeights:
    """Compute the bytes of the weights as they are usually stored: in the dtype of config.json, or quantized.

    Args:
        family: family of the model, which knows the names of the tensors.
        config: config of the model.
        quantization: settings from `jaxmoe.quant.read_quantization`; None for a plain checkpoint.
    """
    itemsize = jnp.dtype(config.dtype or "bfloat16").itemsize
    formats: dict[str, Counter[str]] = defaultdict(Counter)
    seen = set()
    for block in written_blocks(abstract_specs(config), family, written_form(family, "per_expert")):
        name, shape = block.tensor, block.tensor_shape
        if name is None or name in seen:
            continue
        seen.add(name)
        form = None
        # Biases of experts are matrices, and weights of none.
        if quantization is not None and len(shape) > 1 and not block.param.rpartition(".")[2].startswith("b_"):
            modules = [stored.removesuffix(".weight") for stored in family.stored_names(name)]
            named = [module for module in modules if quantization.rules.named(module)[0]]
            form = quantization.format_of((named or modules)[0])
        size = math.prod(shape) * itemsize if form is None else form.stored_bytes(shape)
        part = "routed experts" if is_expert_stack(block.param) else part_of(block.param)
        formats[part][PLAIN if form is None else form.describe()] += size
    return StoredWeights(
        formats={part: dict(sizes) for part, sizes in formats.items()},
        method=None if quantization is None else quantization.method,
    )


def part_of(path: str) -> str:
    """The part of a plan that a parameter other than an expert stack belongs to."""
    if ".moe.shared." in path or path.endswith("w_shared_gate"):
        return "shared experts"
    if ".attention." in path:
        return "attention"
    return "embedding and head" if path.startswith(("embed.", "lm_head.")) else "other"
