"""The tensors of a checkpoint that is to be written: blocks the other way round."""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_shape, union_volume, volume, whole
from jaxmoe.checkpoint.formats import (
    DTYPE_NAMES,
    ELEMENT_TYPES,
    DecodedTensor,
    TensorInfo,
    can_cast,
    read_box,
    read_tensor,
)
from jaxmoe.checkpoint.mapping import Block
from jaxmoe.checkpoint.saving.values import Values
from jaxmoe.layers import ParamSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputTensor:
    """One tensor to write.

    Attributes:
        name: its name.
        dtype_name: its element type as safetensors calls it.
        shape: its dims.
        nbytes: bytes of data.
        values: function that makes its values, row-major; called once, when it is this tensor's turn.
        params: paths of the parameters that it has values of; none for a copy.
        input_scale: static scale that the inputs of such a weight are rounded to fp8 by; None where it has none.
    """

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    nbytes: int
    values: Callable[[], np.ndarray]
    params: tuple[str, ...] = ()
    input_scale: float | None = None

    @property
    def dtype(self) -> np.dtype:
        """The NumPy dtype of its values."""
        found = ELEMENT_TYPES[self.dtype_name].dtype
        assert found is not None, f"{self.name} is copied as bytes"
        return found


def output_tensors(
    specs: Mapping[str, ParamSpec],
    blocks: Iterable[Block],
    values: Values,
    dtype: np.dtype | None,
    model_dtype: np.dtype,
) -> list[OutputTensor]:
    """The tensors that blocks name, put together from the parameters they would fill.

    An element of a tensor that fills several places (replicas of an expert, repeated key/value heads) is taken from
    the first; padding comes from no tensor, so it is in none.

    Args:
        specs: parameters by path.
        blocks: blocks from `written_blocks`.
        values: values of the parameters.
        dtype: type of the tensors; None for that which each is held in.
        model_dtype: type of the model. Parameters that it holds wider than that (routers are float32) are rounded only where
            no value changes.

    Returns:
        The tensors in the order of the parameters.
    """
    regions: dict[str, dict[Box, Block]] = defaultdict(dict)
    for block in blocks:
        if block.tensor is not None:
            regions[block.tensor].setdefault(block.tensor_box, block)
    wide = {path for path, spec in specs.items() if spec.dtype.itemsize > model_dtype.itemsize}
    return [_output(name, list(parts.values()), wide, values, dtype) for name, parts in regions.items()]


def copied_tensor(tensor: TensorInfo, descriptors: Mapping[Path, int]) -> OutputTensor:
    """A tensor of a checkpoint as it is, whatever is in it; a quantized weight is decoded."""
    decoded = isinstance(tensor, DecodedTensor)

    def read() -> np.ndarray:
        if decoded or tensor.dim_order is not None:
            return read_tensor(descriptors, tensor, whole(tensor.shape))[0]
        # As bytes: the elements may be smaller than that.
        raw = dataclasses.replace(tensor, dtype=np.dtype(np.uint8), shape=(tensor.nbytes,))
        values = np.empty(tensor.nbytes, np.uint8)
        read_box(descriptors, raw, whole(raw.shape), values)
        return values

    dtype_name, nbytes = tensor.dtype_name, tensor.nbytes
    if decoded:
        assert tensor.dtype is not None
        dtype_name, nbytes = DTYPE_NAMES[tensor.dtype], volume(whole(tensor.shape)) * tensor.dtype.itemsize
    return OutputTensor(name=tensor.name, dtype_name=dtype_name, shape=tensor.shape, nbytes=nbytes, values=read)


def _output(
    name: str, blocks: list[Block], wide: Collection[str], values: Values, dtype: np.dtype | None
) -> OutputTensor:
    shape = blocks[0].split_shape
    boxes = tuple([block.tensor_box for block in blocks])
    assert union_volume(shape, boxes) == volume(whole(shape)), f"no parameter holds all of tensor {name!r} {shape}"
    chosen = _written_dtype(blocks, wide, values, dtype)

    def gather() -> np.ndarray:
        result = np.empty(shape, chosen)
        for block in blocks:
            # With the ellipsis a scalar gives a view as well, and not its value.
            region: Any = (*[slice(start, stop) for start, stop in block.tensor_box], ...)
            part = _tensor_order(block, values.read(block.param, block.param_box))
            np.copyto(result[region], part, casting="unsafe")
        return result.reshape(blocks[0].tensor_shape)

    return OutputTensor(
        name=name,
        dtype_name=DTYPE_NAMES[chosen],
        shape=blocks[0].tensor_shape,
        nbytes=volume(whole(shape)) * chosen.itemsize,
        values=gather,
        params=tuple(dict.fromkeys(block.param for block in blocks)),
        input_scale=_input_scale(blocks, values),
    )


def _input_scale(blocks: list[Block], values: Values) -> float | None:
    scales = [values.input_scale(block.param, block.param_box) for block in blocks]
    given = [scale for scale in scales if scale is not None]
    return max(given) if len(given) == len(scales) else None


def _written_dtype(blocks: list[Block], wide: Collection[str], values: Values, dtype: np.dtype | None) -> np.dtype:
    held = np.dtype(values.dtype(blocks[0].param, blocks[0].param_box))
    for block in blocks[1:]:
        held = np.dtype(jnp.promote_types(held, values.dtype(block.param, block.param_box)))
    if held == np.int32:
        return np.dtype(np.int64)  # indices, as torch has them
    if dtype is None or dtype == held or not can_cast(held, dtype):
        return held
    if not any(block.param in wide for block in blocks):
        return dtype
    parts = (values.read(block.param, block.param_box) for block in blocks)
    with np.errstate(over="ignore"):  # what overflows is not equal afterwards
        unchanged = all(np.array_equal(part, part.astype(dtype).astype(held), equal_nan=True) for part in parts)
    return dtype if unchanged else held


def _tensor_order(block: Block, part: np.ndarray) -> np.ndarray:
    """View of `part`, the block's region of its parameter, with the dims of the tensor."""
    kept = [dim for dim in block.dims if dim is not None]
    # Dims without a partner have one element: they can be anywhere, and the reshape drops or adds them.
    rest = [dim for dim in range(part.ndim) if dim not in kept]
    return part.transpose(*kept, *rest).reshape(box_shape(block.tensor_box))
