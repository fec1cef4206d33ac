"""The proofs behind `MappedCheckpoint.check`: a tensor is right and used, a parameter is filled exactly once."""

import itertools
from collections.abc import Mapping, Sequence

import jax

from jaxmoe.checkpoint.boxes import Box, Cover, contains, intersect, join_dims, whole
from jaxmoe.checkpoint.errors import Problems
from jaxmoe.checkpoint.formats import Split, TensorInfo, can_cast
from jaxmoe.checkpoint.mapping.blocks import Block
from jaxmoe.checkpoint.nearest import nearest_name
from jaxmoe.layers.param import ParamSpec

_SUGGESTED = 4  # as many problems as a message shows; finding a name takes a look at all of them


def check_tensors(
    tensors: Mapping[str, TensorInfo], spec: ParamSpec, blocks: Sequence[Block], problems: Problems
) -> None:
    """Every tensor that a block of a parameter names is there and is as the block expects it."""
    if jax.dtypes.canonicalize_dtype(spec.dtype) != spec.dtype:
        problems.add(f"{spec.path} is to be {spec.dtype}, which JAX holds only with jax_enable_x64; ask for 32 bits")
    # A fused tensor has a block per slot: what is wrong with it is said once per parameter.
    wrong: dict[str, str] = {}
    for block in blocks:
        if block.tensor is not None and block.tensor not in wrong:
            tensor = tensors.get(block.tensor)
            suggest = len(problems.found) + len(wrong) < _SUGGESTED
            problem = (
                _missing(tensors, spec, block, suggest) if tensor is None else _tensor_problem(tensor, spec, block)
            )
            if problem:
                wrong[block.tensor] = problem
    for problem in wrong.values():
        problems.add(problem)


def _missing(tensors: Mapping[str, TensorInfo], spec: ParamSpec, block: Block, suggest: bool) -> str:
    assert block.tensor is not None
    text = f"tensor {block.tensor!r} is missing: {spec.path} needs it with shape {block.tensor_shape}"
    if spec.path == "lm_head.weight":
        return f"{text}; where the output projection is the embedding, config.json says tie_word_embeddings: true"
    nearest = nearest_name(block.tensor, tensors) if suggest else None
    return f"{text}; the nearest name that is there is {nearest!r}" if nearest else text


def _tensor_problem(tensor: TensorInfo, spec: ParamSpec, block: Block) -> str | None:
    if tensor.shape != block.tensor_shape:
        return _shape_problem(tensor, block)
    if not contains(whole(block.split_shape), block.tensor_box):
        return f"{spec.path} needs {_region(block.tensor_box)} of tensor {tensor.name!r} {block.split_shape}, outside of it"
    if tensor.dtype is None or not (tensor.dtype == spec.dtype or can_cast(tensor.dtype, spec.dtype)):
        return (
            f"tensor {tensor.name!r} is {tensor.dtype_name}, and {spec.path} is {spec.dtype}: only BF16, F16, F32 and "
            "F64 are cast to one another; a quantized checkpoint needs the reader of its format"
        )
    return None


def _shape_problem(tensor: TensorInfo, block: Block) -> str:
    expected = block.tensor_shape
    text = f"tensor {tensor.name!r} has shape {tensor.shape}; {block.param} needs {expected}"
    if tensor.shape == (*expected[:-2], *expected[:-3:-1]):
        text += " (its last two dims are swapped: this is an (in, out) layout under the same name)"
    return f"{text}; does config.json belong to this checkpoint?"


def check_used_whole(tensor: TensorInfo, boxes: Sequence[Box], split: Split, problems: Problems) -> None:
    """Every element of a tensor is in one of the regions of it that fill something.

    Args:
        tensor: tensor as the checkpoint has it.
        boxes: distinct regions of it, its dims split.
        split: dims that its dims are split in; see `Block.tensor_split`.
        problems: list that gets what is wrong.
    """
    shape = tuple(itertools.chain(*split)) or tensor.shape
    everything = whole(shape)
    if everything in boxes or not all(len(box) == len(everything) and contains(everything, box) for box in boxes):
        return  # a box outside the tensor is reported with its parameter
    cover = Cover(shape, boxes)
    if not cover.counts.all():
        gap = cover.first(cover.counts == 0)
        gap = join_dims(gap, split) if split else gap
        problems.add(f"{_region(gap)} of tensor {tensor.name!r} {tensor.shape} fills no parameter")


def check_filled_once(spec: ParamSpec, blocks: Sequence[Block], problems: Problems) -> None:
    """Every element of the parameter is filled by exactly one block."""
    boxes, everything = [block.param_box for block in blocks], whole(spec.shape)
    outside = [box for box in boxes if not contains(everything, box)]
    if outside:
        problems.add(f"{spec.path} {spec.shape} is to be filled at {_region(outside[0])}, outside of it")
        return
    cover = Cover(spec.shape, boxes)
    if (cover.counts == 0).any():
        problems.add(f"{_region(cover.first(cover.counts == 0))} of {spec.path} {spec.shape} is filled by nothing")
    if (cover.counts > 1).any():
        twice = cover.first(cover.counts > 1)
        names = [block.tensor for block, box in zip(blocks, boxes, strict=True) if intersect(box, twice)]
        problems.add(f"{_region(twice)} of {spec.path} {spec.shape} is filled {len(names)} times, by {names[:3]}")


def _region(box: Box) -> str:
    """`box` the way it is written in Python."""
    return f"[{', '.join(f'{start}:{stop}' for start, stop in box)}]"
