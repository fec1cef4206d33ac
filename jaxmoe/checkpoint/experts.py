"""Blocks of expert stacks: which of a checkpoint's expert layouts a layer uses, and what fills each slot.

A layer's experts are two parameters, ``w_gate_up`` [P, 2, F, D] (gate, then up) and ``w_down`` [P, D, F], whose
`ParamSpec.rows` is the layer's ``slot_to_expert``. On disk they are one of two layouts (the bare letters A and B are
used in messages and tests):

* A, per expert: gate and up [F, D], down [D, F], one tensor each per expert;
* B, fused: gate_up [E, 2F, D] with the gate's rows first, down [E, D, F].

One checkpoint may use both, in different layers, so each layer is asked on its own.
"""

from collections.abc import Collection
from typing import Literal

from jaxmoe.checkpoint.blocks import Block
from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.layers.param import ParamSpec
from jaxmoe.models.family import ExpertTensors

ExpertLayout = Literal["per_expert", "fused"]


def find_expert_layout(names: ExpertTensors, tensors: Collection[str], num_experts: int) -> ExpertLayout:
    """Decide which layout one layer uses by which names are there.

    Args:
        names: of this layer.
        tensors: names in the checkpoint.
        num_experts: logical experts E.

    Returns:
        The layout of which anything is there. That it is complete is checked by the plan, with everything else.

    Raises:
        CheckpointError: both layouts are there, or neither.
    """
    fused = [name for name in names.fused if name in tensors]
    per_expert = [name for expert in range(num_experts) for name in names.per_expert(expert) if name in tensors]
    if fused and per_expert:
        raise CheckpointError(
            f"the experts of a layer are either fused or one tensor each; both {fused[0]!r} and {per_expert[0]!r} "
            "are there, and nothing says which is meant; remove one of the two from the checkpoint"
        )
    if not fused and not per_expert:
        raise CheckpointError(
            f"the experts of a layer must be there as {names.fused_gate_up!r} or as {names.per_expert(0)[0]!r} and so "
            "on; the checkpoint has neither; does its config.json belong to it?"
        )
    return "fused" if fused else "per_expert"


def expert_blocks(gate_up: ParamSpec, down: ParamSpec, names: ExpertTensors, tensors: Collection[str]) -> list[Block]:
    """Blocks of one layer's expert stacks, from whichever layout the layer has.

    Args:
        gate_up: ``w_gate_up`` [P, 2, F, D].
        down: ``w_down`` [P, D, F].
        names: of this layer.
        tensors: names in the checkpoint.

    Raises:
        CheckpointError: as `find_expert_layout`.
    """
    assert down.source_groups is not None, f"{down.path}: rows without source_groups"
    layout = find_expert_layout(names, tensors, down.source_groups)
    build = fused_expert_blocks if layout == "fused" else per_expert_blocks
    return build(gate_up, down, names)


def per_expert_blocks(gate_up: ParamSpec, down: ParamSpec, names: ExpertTensors) -> list[Block]:
    """Blocks of one layer's expert stacks from layout A; arguments as `expert_blocks`."""
    model, width = _widths(gate_up, down)
    blocks = []
    for slot, expert in _filled_slots(down):
        *halves, down_name = names.per_expert(expert)
        for half, name in enumerate(halves):
            blocks.append(_block(gate_up, (slot, half), name, (width, model), (0, 0), (2, 3)))
        blocks.append(_block(down, (slot,), down_name, (model, width), (0, 0), (1, 2)))
    return blocks + _padding_blocks(gate_up) + _padding_blocks(down)


def fused_expert_blocks(gate_up: ParamSpec, down: ParamSpec, names: ExpertTensors) -> list[Block]:
    """Blocks of one layer's expert stacks from layout B; arguments as `expert_blocks`."""
    model, width = _widths(gate_up, down)
    experts = down.source_groups
    assert experts is not None, f"{down.path}: rows without source_groups"
    gate_up_shape, down_shape = (experts, 2 * width, model), (experts, model, width)
    blocks = []
    for slot, expert in _filled_slots(down):
        for half in range(2):
            start = (expert, half * width, 0)
            blocks.append(_block(gate_up, (slot, half), names.fused_gate_up, gate_up_shape, start, (0, 2, 3)))
        blocks.append(_block(down, (slot,), names.fused_down, down_shape, (expert, 0, 0), (0, 1, 2)))
    return blocks + _padding_blocks(gate_up) + _padding_blocks(down)


def _widths(gate_up: ParamSpec, down: ParamSpec) -> tuple[int, int]:
    """D and F of a pair of stacks that belong together."""
    slots, model, width = down.shape
    assert gate_up.shape == (slots, 2, width, model), f"{gate_up.path} {gate_up.shape} with {down.shape}"
    assert gate_up.rows == down.rows, f"{gate_up.path} and {down.path} hold different experts"
    return model, width


def _filled_slots(spec: ParamSpec) -> list[tuple[int, int]]:
    """(slot, logical expert) of every slot that is not padding."""
    assert spec.rows is not None, f"{spec.path}: an expert stack without rows"
    assert len(spec.rows) == spec.shape[0], f"{spec.path}: one row per slot"
    return [(slot, expert) for slot, expert in enumerate(spec.rows) if expert >= 0]


def _padding_blocks(spec: ParamSpec) -> list[Block]:
    """Zeros for the slots that hold no expert."""
    inner = spec.shape[1:]
    return [
        Block(param=spec.path, param_start=(slot, *[0] * len(inner)), shape=(1, *inner))
        for slot, expert in enumerate(spec.rows or ())
        if expert < 0
    ]


def _block(
    spec: ParamSpec,
    place: tuple[int, ...],
    name: str,
    tensor_shape: tuple[int, ...],
    tensor_start: tuple[int, ...],
    dims: tuple[int, ...],
) -> Block:
    """The matrix at `place` (slot, or slot and half) of a stack, from a matrix of a tensor."""
    matrix = spec.shape[len(place) :]
    return Block(
        param=spec.path,
        param_start=(*place, 0, 0),
        shape=(*[1] * len(place), *matrix),
        tensor=name,
        tensor_shape=tensor_shape,
        tensor_start=tensor_start,
        dims=dims,
    )
