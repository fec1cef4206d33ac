"""Parameters that stay packed: which of a model's can, and in which blocks of scales.

Blocks of scales are made smaller where something cuts them: a device's part of a dim, rows of a tensor that start inside a
block, gate and up in one dim. The scale of a block is then repeated for its parts.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxmoe.checkpoint.formats import DecodedTensor
from jaxmoe.checkpoint.mapping.mapped import MappedCheckpoint
from jaxmoe.checkpoint.mapping.packed_blocks import Cut, axes_of
from jaxmoe.checkpoint.mapping.rounding import round_inputs
from jaxmoe.layers.packed import pack_params, packable_params
from jaxmoe.layers.param import ParamSpec
from jaxmoe.models import Decoder
from jaxmoe.quant.packing import Packing


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
        axes = axes_of(block.tensor_shape, block.tensor_split, block.dims, len(spec.shape))
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


def _turned(axes: tuple[Cut, Cut], tensor: DecodedTensor) -> bool:
    """Whether the parameter's outputs are what the format calls inputs."""
    outputs_first = axes[0].tensor_dim < axes[1].tensor_dim
    return outputs_first == tensor.weight.format.transposed
