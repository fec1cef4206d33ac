"""The checkpoint that a config.json promises: names, shapes and formats of its tensors, without a file of weights."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.formats import Checkpoint, DecodedTensor, TensorInfo
from jaxmoe.checkpoint.mapping.blocks import Block
from jaxmoe.checkpoint.mapping.mapped import MappedCheckpoint
from jaxmoe.checkpoint.mapping.names import written_blocks, written_form
from jaxmoe.config import DecoderConfig
from jaxmoe.layers import ParamSpec
from jaxmoe.models import Family
from jaxmoe.models.parts import is_expert_stack
from jaxmoe.quant import QuantFormat, Quantization, QuantizedWeight
from jaxmoe.quant.base import swap_last

_FLOAT32 = np.dtype(np.float32)


class _Header(NamedTuple):
    """A part of a quantized weight, as it is usually stored."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]


def expected_checkpoint(
    specs: Mapping[str, ParamSpec],
    family: Family,
    config: DecoderConfig,
    quantization: Quantization | None = None,
    path: Path = Path(),
    *,
    one_expert: bool = False,
) -> MappedCheckpoint:
    """Map the tensors that a checkpoint usually has to the parameters of a model.

    Args:
        specs: parameters of the model, as plain arrays on whichever mesh.
        family: family of the model, which knows the names of the tensors.
        config: config of the model.
        quantization: settings from `jaxmoe.quant.read_quantization`; None for a plain checkpoint.
        path: place of the checkpoint, for messages.
        one_expert: whether the tensors of one expert stand for those of all in its layer, where no setting tells one from
            another. That is enough to count bytes and choose forms, and a hundred times fewer tensors.
    """
    form = written_form(family, "per_expert")
    whole, copies = specs, dict[str, int]()
    if one_expert and form == "per_expert" and not (quantization and quantization.rules.may_tell_experts_apart):
        specs = {name: _one_expert(spec) if is_expert_stack(name) else spec for name, spec in whole.items()}
    blocks = list(written_blocks(specs, family, form))
    dtype = np.dtype(jnp.dtype(config.dtype or "bfloat16"))
    tensors: dict[str, TensorInfo] = {}
    for block in blocks:
        if block.tensor is not None and block.tensor not in tensors:
            quantized = None if quantization is None else _format_of(block, family, quantization)
            tensors[block.tensor] = _tensor(block.tensor, block.tensor_shape, dtype, quantized, path)
            if specs[block.param] is not whole[block.param]:
                copies[block.tensor] = whole[block.param].source_groups or 1
    mapped = MappedCheckpoint.of(Checkpoint(path=path, files=(), tensors=tensors), whole.values(), blocks)
    return dataclasses.replace(mapped, copies=copies)


def _one_expert(stack: ParamSpec) -> ParamSpec:
    """A stack of the first expert of a layer alone."""
    return dataclasses.replace(stack, shape=(1, *stack.shape[1:]), rows=(0,), source_groups=1)


def _format_of(block: Block, family: Family, quantization: Quantization) -> QuantFormat | None:
    # Biases of experts are matrices, and weights of none.
    if len(block.tensor_shape) < 2 or block.param.rpartition(".")[2].startswith("b_"):
        return None
    assert block.tensor is not None
    modules = [stored.removesuffix(".weight") for stored in family.stored_names(block.tensor)]
    named = [module for module in modules if quantization.rules.named(module)[0]]
    return quantization.format_of((named or modules)[0])


def _tensor(name: str, shape: tuple[int, ...], dtype: np.dtype, form: QuantFormat | None, path: Path) -> TensorInfo:
    if form is None:
        nbytes = math.prod(shape) * dtype.itemsize
        return TensorInfo(name, dtype.name, dtype, shape, path, 0, nbytes)
    matrices = swap_last(shape) if form.transposed else shape
    parts = [(part, form.shapes(part.role, matrices)) for part in form.parts if part.required and part.decoded]
    stored = {part.role: _Header(part.names(name)[0], part.dtypes[0], shapes[0]) for part, shapes in parts if shapes}
    if form.activations is not None and form.activations.is_static:
        part = next(part for part in form.parts if part.role == "input_scale")
        stored[part.role] = _Header(part.names(name)[0], part.dtypes[0], matrices[:-2])
    return DecodedTensor(
        name=name,
        dtype_name=form.name,
        dtype=_FLOAT32,
        shape=shape,
        file=path,
        offset=0,
        nbytes=form.stored_bytes(shape),
        weight=QuantizedWeight(name, form, stored, shape),
        parts={},
    )
