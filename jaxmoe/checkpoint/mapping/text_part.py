"""The text part's share of tensors that a multimodal checkpoint has turned, or together with those of another part."""

import dataclasses
from collections.abc import Mapping

from jaxmoe.checkpoint.formats import Checkpoint, DecodedTensor, TensorInfo
from jaxmoe.models import Wrapper


def text_part(checkpoint: Checkpoint, wrapper: Wrapper | None) -> Checkpoint:
    """The same checkpoint with tensors as the text model has them; nothing is read, and every byte stays in one of them.

    A matrix that is stored (in, out) becomes one of (out, in) in another order of its bytes. Of a tensor of two rows the
    first keeps the name, and the second, which is not the text part's, gets "[1]" behind it.

    Args:
        checkpoint: tensors under the names that they have in the files.
        wrapper: multimodal model; None for a text model.
    """
    if wrapper is None:
        return checkpoint
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        tensors |= _as_in_text(name, tensor, wrapper)
    return dataclasses.replace(checkpoint, tensors=tensors)


def _as_in_text(name: str, tensor: TensorInfo, wrapper: Wrapper) -> Mapping[str, TensorInfo]:
    # What is quantized has parts of its own, and these tensors never are; shapes are checked behind this.
    plain = len(tensor.shape) == 2 and not isinstance(tensor, DecodedTensor)
    if plain and wrapper.is_turned(name):
        order = (1, 0) if tensor.dim_order is None else None
        return {name: dataclasses.replace(tensor, shape=tensor.shape[::-1], dim_order=order)}
    if plain and wrapper.shares_rows(name) and tensor.shape[0] == 2 and tensor.dim_order is None:
        half = tensor.nbytes // 2
        row = dataclasses.replace(tensor, shape=(1, tensor.shape[1]), nbytes=half)
        other = f"{name}[1]"
        return {name: row, other: dataclasses.replace(row, name=other, offset=tensor.offset + half)}
    return {name: tensor}
