"""The blocks of parameters that stay packed, as those of the arrays of their packed form.

A packed parameter is several arrays (`jaxmoe.layers.packed`), and each of them is filled by blocks of its own, which are
those of the plain parameter counted in the units of that array: bytes of two numbers, or blocks that share a scale.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jaxmoe.checkpoint.boxes import Box
from jaxmoe.checkpoint.formats import DecodedTensor, PackedTensor, Split, TensorInfo
from jaxmoe.checkpoint.mapping.blocks import Block
from jaxmoe.checkpoint.mapping.mapped import MappedCheckpoint
from jaxmoe.layers.packed import part_specs
from jaxmoe.layers.param import ParamSpec
from jaxmoe.quant.packing import OF_MATRICES, Packing


class Cut(NamedTuple):
    """The way that a dim of matrices runs from a tensor to a parameter.

    Attributes:
        tensor_dim: dim of the tensor, its dims together.
        place: dim of the tensor, its dims split, that runs along the parameter's.
        innermost: whether that is the innermost of the dims that `tensor_dim` is split in.
    """

    tensor_dim: int
    place: int
    innermost: bool


# The experts of a checkpoint repeat the same few patterns thousands of times: hence the cache.
@lru_cache
def axes_of(shape: tuple[int, ...], split: Split, dims: tuple[int | None, ...], ndim: int) -> tuple[Cut, Cut] | None:
    """The ways of a parameter's outputs and inputs, None where they are not two dims of the tensor.

    Args:
        shape, split, dims: those of a block's tensor; see `Block`.
        ndim: number of dims of the parameter.
    """
    split = split or tuple([(size,) for size in shape])
    found: dict[int, Cut] = {}
    place = 0
    for dim, sizes in enumerate(split):
        for index in range(len(sizes)):
            of = dims[place]
            if of is not None and of >= ndim - 2:
                found[of] = Cut(dim, place, index == len(sizes) - 1)
            place += 1
    axes = found.get(ndim - 2), found.get(ndim - 1)
    if axes[0] is None or axes[1] is None:
        return None
    matrices = {len(split) - 2, len(split) - 1}
    return (axes[0], axes[1]) if {axes[0].tensor_dim, axes[1].tensor_dim} == matrices else None


def hold_packed(mapped: MappedCheckpoint, packings: Mapping[str, Packing]) -> MappedCheckpoint:
    """Map a checkpoint to a model some of whose parameters stay packed.

    Args:
        mapped: checkpoint mapped to the parameters as plain arrays, and checked to fill them.
        packings: form of those that stay packed, from `choose_packings`.

    Returns:
        The blocks of every array, those of packed parameters from tensors that `PackedTensor` describes, or from the stored
        ones where these hold the very bytes. What the checkpoint has besides is not looked at.
    """
    tensors = dict(mapped.checkpoint.tensors)
    specs: dict[str, ParamSpec] = {}
    blocks: dict[str, Sequence[Block]] = {}
    for path, spec in mapped.specs.items():
        if path not in packings:
            specs[path], blocks[path] = spec, mapped.blocks[path]
            continue
        for role, part in part_specs(spec, packings[path]).items():
            specs[part.path] = part
            array = _ArrayBlocks(spec, part, role, packings[path])
            own: dict[Box, Block] = {}
            for block in mapped.blocks[path]:
                found = array.block(block, tensors)
                box = found.param_box
                # Rows that are there twice, or padded, have one scale where it is that of a whole tensor.
                if found.tensor is not None or box not in own:
                    own[box] = found
            blocks[part.path] = list(own.values())
    return dataclasses.replace(
        mapped,
        checkpoint=dataclasses.replace(mapped.checkpoint, tensors=tensors),
        specs=specs,
        blocks=blocks,
        complete=False,
    )


class _Part(NamedTuple):
    """A block's part of a tensor as one of an array of the packed form.

    Attributes:
        units: elements of the last two dims of the tensor that an element of the array stands for.
        shape, start, dims, split: those of a block; see `Block`.
    """

    units: tuple[int, int]
    shape: tuple[int, ...]
    start: tuple[int, ...]
    dims: tuple[int | None, ...]
    split: Split


class _ArrayBlocks:
    """The blocks of a parameter as those of one array of its packed form."""

    def __init__(self, spec: ParamSpec, part: ParamSpec, role: str, packing: Packing) -> None:
        self._spec, self._part, self._role, self._packing = spec, part, role, packing
        self._units = packing.units(role, spec.shape)
        # The blocks of experts are alike but for their places and the names of their tensors.
        self._parts: dict[tuple, _Part] = {}

    def block(self, block: Block, tensors: dict[str, TensorInfo]) -> Block:
        """A block of the array; its tensor is put among `tensors`."""
        kept = len(self._part.shape)
        (*start, row, column), (*shape, rows, columns), (N, K) = block.param_start, block.shape, self._units
        region: dict[str, Any] = {
            "param": self._part.path,
            "param_start": (*start, row // N, column // K)[:kept],
            "shape": (*shape, max(rows // N, 1), max(columns // K, 1))[:kept],
        }
        if block.tensor is None:
            return Block(**region)
        tensor = tensors[block.tensor]
        assert isinstance(tensor, DecodedTensor), f"{self._spec.path}: {block.tensor} is not quantized"
        pattern = (block.tensor_shape, block.tensor_start, block.dims, block.tensor_split)
        part = self._parts.get(pattern) or self._parts.setdefault(pattern, self._part_of(block))
        name = f"{block.tensor}, {self._role} of {part.units[0]} x {part.units[1]}"
        if name not in tensors:
            tensors[name] = PackedTensor.of(tensor, self._role, part.units, self._part.dtype).as_it_is()
        return Block(
            **region,
            tensor=name,
            tensor_shape=part.shape,
            tensor_start=part.start,
            dims=part.dims,
            tensor_split=part.split,
        )

    def _part_of(self, block: Block) -> _Part:
        ndim = len(self._spec.shape)
        axes = axes_of(block.tensor_shape, block.tensor_split, block.dims, ndim)
        assert axes is not None, f"{self._spec.path}: {block.tensor} has no matrices"
        start, dims = list(block.tensor_start), list(block.dims)
        split = [list(sizes) for sizes in block.tensor_split or [(size,) for size in block.tensor_shape]]
        units = [1, 1]
        for side, (unit, cut) in enumerate(zip(self._units, axes, strict=True)):
            sizes, inner = split[cut.tensor_dim], cut.place - sum(map(len, split[: cut.tensor_dim]))
            if self._role in OF_MATRICES or (self._role != "values" and self._packing.block[side] is None):
                # One entry for the whole tensor, of which the parameter may be a part.
                unit = sizes[inner] if cut.innermost else 1
                start[cut.place] = 0
            if ndim - 2 + side >= len(self._part.shape):
                dims[cut.place] = None
            units[cut.tensor_dim - len(split)] = unit
            sizes[inner] //= unit
            start[cut.place] //= unit
        return _Part(
            units=(units[0], units[1]),
            shape=tuple([math.prod(sizes) for sizes in split]),
            start=tuple(start),
            dims=tuple(dims),
            split=tuple(map(tuple, split)) if block.tensor_split else (),
        )
