"""Parameters that stay packed: which of a model's can, in which blocks, and the way from tensors to their arrays.

A packed parameter is several arrays (`jaxmoe.layers.packed`), and each of them is filled by blocks of its own, which are
those of the plain parameter counted in the units of that array: bytes of two numbers, or blocks that share a scale.

Blocks of scales are made smaller where something cuts them: a device's part of a dim, rows of a tensor that start inside a
block, gate and up in one dim. The scale of a block is then repeated for its parts.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoe.checkpoint.boxes import Box
from jaxmoe.checkpoint.formats import DecodedTensor, PackedTensor, TensorInfo
from jaxmoe.checkpoint.mapping.blocks import Block
from jaxmoe.checkpoint.mapping.mapped import MappedCheckpoint
from jaxmoe.checkpoint.mapping.rounding import round_inputs
from jaxmoe.layers.packed import pack_params, packable_params, part_specs
from jaxmoe.layers.param import ParamSpec
from jaxmoe.models import Decoder
from jaxmoe.quant.packing import OF_MATRICES, Packing


class PackingChoice(NamedTuple):
    """The parameters of a model that stay packed, and why others that are quantized do not.

    Attributes:
        packings: {path: form}, its block (N, K) in the order of the parameter's dims.
        decoded: {path: reason}.
        not_rounded: {path: reason} of those whose inputs stay as they are though the checkpoint asks for another form.
    """

    packings: dict[str, Packing]
    decoded: dict[str, str]
    not_rounded: Mapping[str, str] = {}

    def notes(self) -> tuple[str, ...]:
        """The reasons, each once and with the parameters that it is of counted and named, for a report."""
        return (
            *_by_reason("quantized parameters are decoded", self.decoded),
            *_by_reason("parameters multiply with activations as they are", self.not_rounded),
        )

    def check_rounding(self, path: Path) -> None:
        """Refuse to round the inputs of no weight at all.

        Args:
            path: checkpoint, for the message.

        Raises:
            ValueError: no weight stays packed in a form whose inputs are rounded; with the reasons.
        """
        if any(packing.activations for packing in self.packings.values()):
            return
        reasons = dict.fromkeys(self.not_rounded.values()) or ["its settings ask for no form of activations"]
        raise ValueError(
            f'{path}: activations="checkpoint" would round the inputs of no weight: {"; ".join(reasons)}; leave '
            "activations out"
        )


def _by_reason(what: str, reasons: Mapping[str, str]) -> list[str]:
    """A sentence for each reason, the parameters of all layers named as one."""
    found = []
    for reason, count in Counter(reasons.values()).items():
        paths = [path for path, own in reasons.items() if own == reason]
        names = dict.fromkeys(re.sub(r"^layers\.\d+\.", "layers.*.", path) for path in paths)
        found.append(f"{count} {what} ({', '.join(names)}): {reason}")
    return found


class _Cut(NamedTuple):
    """The way that a dim of matrices runs from a tensor to a parameter.

    Attributes:
        tensor_dim: dim of the tensor, its dims together.
        place: dim of the tensor, its dims split, that runs along the parameter's.
        innermost: whether that is the innermost of the dims that `tensor_dim` is split in.
    """

    tensor_dim: int
    place: int
    innermost: bool


def pack_model(model: Decoder, mapped: MappedCheckpoint, *, rounding: bool = False) -> PackingChoice:
    """Make the parameters of an abstract model packed ones, all that can stay so.

    Args:
        model: model without values, all of its parameters plain.
        mapped: checkpoint mapped to them.
        rounding: whether their inputs are rounded as the checkpoint asks, where a kernel does so.
    """
    choice = choose_packings(mapped, packable_params(model), model.dtype)
    if rounding:
        packings, reasons = round_inputs(mapped, choice.packings, choice.decoded)
        choice = PackingChoice(packings, choice.decoded, reasons)
    pack_params(model, mapped.specs.values(), choice.packings)
    return choice


def pack_everything(model: Decoder, mapped: MappedCheckpoint) -> PackingChoice:
    """Choose the packed forms of all parameters that can stay packed, those of inputs that a kernel rounds with them.

    Args:
        model: model without values, all of its parameters plain; it stays so.
        mapped: checkpoint mapped to them.
    """
    choice = choose_packings(mapped, packable_params(model), model.dtype)
    packings, _ = round_inputs(mapped, choice.packings, choice.decoded)
    return PackingChoice(packings, choice.decoded)


def choose_packings(mapped: MappedCheckpoint, packable: Collection[str], dtype: np.dtype) -> PackingChoice:
    """Choose the parameters that stay packed: all that can, where that takes less memory than plain numbers.

    Args:
        mapped: checkpoint mapped to the parameters as plain arrays.
        packable: paths of parameters that a model can hold packed.
        dtype: dtype that they have where they are decoded.
    """
    packings: dict[str, Packing] = {}
    decoded: dict[str, str] = {}
    for path, spec in mapped.specs.items():
        tensors = [mapped.checkpoint.tensors.get(block.tensor) for block in mapped.blocks[path] if block.tensor]
        if not any(isinstance(tensor, DecodedTensor) for tensor in tensors):
            continue
        found = (
            "they are used in other ways than by a product" if path not in packable else _packing(mapped, spec, dtype)
        )
        if isinstance(found, Packing):
            packings[path] = found
        else:
            decoded[path] = found
    return PackingChoice(packings, decoded)


def _packing(mapped: MappedCheckpoint, spec: ParamSpec, dtype: np.dtype) -> Packing | str:
    """The form of one parameter, or the reason why it has none."""
    found: dict[Packing, None] = {}
    cuts: tuple[list[int], list[int]] = ([], [])
    whole = [True, True]
    filled = [block for block in mapped.blocks[spec.path] if block.tensor]
    for block in filled:
        tensor = mapped.checkpoint.tensors.get(block.tensor or "")
        if not isinstance(tensor, DecodedTensor):
            return "a part of them is not quantized"
        packing = tensor.weight.packing
        if packing is None:
            return f"{tensor.form} does not stay packed"
        axes = _axes(block, len(spec.shape))
        if axes is None:
            return "their inputs and outputs are not dims of their own in the checkpoint"
        turned = _turned(axes, tensor)
        if turned and packing.per_byte > 1:
            return "two numbers of a byte are of two outputs"
        if turned:
            packing = dataclasses.replace(packing, block=packing.block[::-1])
        found[packing] = None
        for side, cut in enumerate(axes):
            dim = len(spec.shape) - 2 + side
            sizes = [block.param_start[dim], block.shape[dim], block.tensor_start[cut.place]]
            sizes.append(block.split_shape[cut.place])
            cuts[side].extend(sizes if cut.innermost else [1])
            together = not block.tensor_split or len(block.tensor_split[cut.tensor_dim]) == 1
            whole[side] &= together and (block.param_start[dim], block.shape[dim]) == (0, spec.shape[dim])
    if len(found) != 1:
        return "their parts are quantized in different ways"
    (packing,) = found
    try:
        local = spec.sharding.shard_shape(spec.shape)
    except ValueError:
        return "they do not divide over the mesh"
    cuts[0].append(local[-2])
    cuts[1].append(local[-1])
    if spec.rows is not None and len(spec.shape) == 2:
        cuts[0].append(spec.shape[0] // len(spec.rows))
    block_size = [
        None if native is None and of_whole else math.gcd(native or 0, *of)
        for native, of_whole, of in zip(packing.block, whole, cuts, strict=True)
    ]
    inputs = block_size[1]
    if math.gcd(*cuts[1]) % packing.per_byte or (inputs is not None and inputs % packing.per_byte):
        return "a cut separates two numbers of a byte"
    packing = dataclasses.replace(packing, block=(block_size[0], inputs))
    bits = packing.bits_per_number(spec.shape)
    if bits >= 8 * dtype.itemsize:
        return f"in blocks of {packing.block} they would take {bits:.0f} bits a number"
    return packing


def _axes(block: Block, ndim: int) -> tuple[_Cut, _Cut] | None:
    """The ways of the parameter's outputs and inputs, None where they are not two dims of the tensor."""
    split = block.tensor_split or tuple((size,) for size in block.tensor_shape)
    found: dict[int, _Cut] = {}
    place = 0
    for dim, sizes in enumerate(split):
        for index in range(len(sizes)):
            of = block.dims[place]
            if of is not None and of >= ndim - 2:
                found[of] = _Cut(dim, place, index == len(sizes) - 1)
            place += 1
    axes = found.get(ndim - 2), found.get(ndim - 1)
    if axes[0] is None or axes[1] is None:
        return None
    matrices = {len(split) - 2, len(split) - 1}
    return (axes[0], axes[1]) if {axes[0].tensor_dim, axes[1].tensor_dim} == matrices else None


def _turned(axes: tuple[_Cut, _Cut], tensor: DecodedTensor) -> bool:
    """Whether the parameter's outputs are what the format calls inputs."""
    outputs_first = axes[0].tensor_dim < axes[1].tensor_dim
    return outputs_first == tensor.weight.format.transposed


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
            own: dict[Box, Block] = {}
            for block in mapped.blocks[path]:
                found = _part_block(block, part, role, packings[path], spec, tensors)
                # Rows that are there twice, or padded, have one scale where it is that of a whole tensor.
                if found.tensor is not None or found.param_box not in own:
                    own[found.param_box] = found
            blocks[part.path] = list(own.values())
    return dataclasses.replace(
        mapped,
        checkpoint=dataclasses.replace(mapped.checkpoint, tensors=tensors),
        specs=specs,
        blocks=blocks,
        complete=False,
    )


def _part_block(
    block: Block, part: ParamSpec, role: str, packing: Packing, spec: ParamSpec, tensors: dict[str, TensorInfo]
) -> Block:
    """A block of a parameter as one of an array of its packed form; its tensor is put among `tensors`."""
    ndim, kept, units = len(spec.shape), len(part.shape), packing.units(role, spec.shape)
    start, shape = list(block.param_start), list(block.shape)
    for dim, unit in zip((ndim - 2, ndim - 1), units, strict=True):
        start[dim], shape[dim] = start[dim] // unit, max(shape[dim] // unit, 1)
    region = Block(param=part.path, param_start=tuple(start[:kept]), shape=tuple(shape[:kept]))
    if block.tensor is None:
        return region
    tensor, axes = tensors[block.tensor], _axes(block, ndim)
    assert isinstance(tensor, DecodedTensor), f"{spec.path}: {block.tensor} is not quantized"
    assert axes is not None, f"{spec.path}: {block.tensor} has no matrices"
    tensor_start, dims = list(block.tensor_start), list(block.dims)
    split = [list(sizes) for sizes in block.tensor_split or [(size,) for size in block.tensor_shape]]
    tensor_units = [1, 1]
    for side, (unit, cut) in enumerate(zip(units, axes, strict=True)):
        sizes, inner = split[cut.tensor_dim], cut.place - sum(map(len, split[: cut.tensor_dim]))
        if role in OF_MATRICES or (role != "values" and packing.block[side] is None):
            # One entry for the whole tensor, of which the parameter may be a part.
            unit = sizes[inner] if cut.innermost else 1
            tensor_start[cut.place] = 0
        if ndim - 2 + side >= kept:
            dims[cut.place] = None
        tensor_units[cut.tensor_dim - len(split)] = unit
        sizes[inner] //= unit
        tensor_start[cut.place] //= unit
    name = f"{block.tensor}, {role} of {tensor_units[0]} x {tensor_units[1]}"
    if name not in tensors:
        tensors[name] = PackedTensor.of(tensor, role, (tensor_units[0], tensor_units[1])).as_it_is()
    return dataclasses.replace(
        region,
        tensor=name,
        tensor_shape=tuple([math.prod(sizes) for sizes in split]),
        tensor_start=tuple(tensor_start),
        dims=tuple(dims),
        tensor_split=tuple(map(tuple, split)) if block.tensor_split else (),
    )
