"""A model's share of tensors that a checkpoint has otherwise: turned, or with rows of something else behind its own."""

import dataclasses
import re

from jaxmoe.checkpoint.formats import Checkpoint, DecodedTensor, TensorInfo
from jaxmoe.config import DecoderConfig, MoEConfig
from jaxmoe.models import Family

REST = "[rest]"


def own_part(checkpoint: Checkpoint, family: Family, config: DecoderConfig) -> Checkpoint:
    """The same checkpoint with tensors as the model has them; nothing is read, and every byte stays in one of them.

    A matrix that is stored (in, out) becomes one of (out, in) in another order of its bytes. Where the first rows alone are
    the model's they keep the name, and the others get "[rest]" behind it.

    Args:
        checkpoint: tensors under the names that they have in the files.
        family: family of the model.
        config: config of the model.
    """
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        # What is quantized has parts of its own, and of these tensors none ever is; shapes are checked behind this.
        if isinstance(tensor, DecodedTensor):
            tensors[name] = tensor
        elif len(tensor.shape) == 2 and family.wrapper and family.wrapper.is_turned(name):
            order = (1, 0) if tensor.dim_order is None else None
            tensors[name] = dataclasses.replace(tensor, shape=tensor.shape[::-1], dim_order=order)
        else:
            tensors |= _first_rows(tensor, _own_rows(tensor, family, config))
    return dataclasses.replace(checkpoint, tensors=tensors)


def _own_rows(tensor: TensorInfo, family: Family, config: DecoderConfig) -> int | None:
    """The number of rows that are the model's; None for all of them."""
    rows = tensor.shape[0] if tensor.shape else 0
    if family.wrapper and rows == 2 and family.wrapper.shares_rows(tensor.name):
        return 1
    if family.padded_experts and re.fullmatch(family.padded_experts, tensor.name):
        for layer in config.layers:
            moe = layer.feed_forward
            if isinstance(moe, MoEConfig) and moe.zero_experts and rows == moe.num_choices:
                return moe.num_experts
    return None


def _first_rows(tensor: TensorInfo, own: int | None) -> dict[str, TensorInfo]:
    """The tensor in two, of `own` rows and of the others; in one where that is None or its rows are not one by one."""
    if own is None or tensor.dim_order is not None:
        return {tensor.name: tensor}
    rows, *others = tensor.shape
    size = tensor.nbytes // rows
    first = dataclasses.replace(tensor, shape=(own, *others), nbytes=own * size)
    rest = dataclasses.replace(
        tensor,
        name=f"{tensor.name}{REST}",
        shape=(rows - own, *others),
        offset=tensor.offset + own * size,
        nbytes=(rows - own) * size,
    )
    return {first.name: first, rest.name: rest}
