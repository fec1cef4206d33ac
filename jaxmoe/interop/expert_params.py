"""Rows that say which parameter, expert and part a checkpoint tensor of a routed expert fills, as in vLLM.

vLLM keeps the experts of a layer in two stacks, ``experts.w13_weight`` (gate and up) and ``experts.w2_weight`` (down),
and describes a checkpoint by rows (param_name, weight_name, expert_id, shard_id): a tensor whose name holds
`weight_name` fills the parameter that has `param_name` in its place. What follows stays, so that one row maps
``weight``, ``weight_scale_inv``, ``input_scale`` and ``g_idx`` alike. Names match by whole components: an expert "1" is not
found in "11" or "01".

Source: vllm/model_executor/layers/fused_moe/routed_experts.py of vLLM 0.33 (``build_expert_params_mapping``,
``load_weights``).
"""

import re
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.interop.expert_maps import initial_physical_to_logical

ShardId = Literal["w1", "w2", "w3"]
"""Gate (or the only projection in, where there is no gate), down, up."""

WEIGHT_SCALES = ("weight_scale", "weight_scale_inv", "weight_scale_2")
ACTIVATION_SCALES = ("input_scale", "activation_scale")

_STACKS: dict[ShardId, str] = {"w1": "w13", "w2": "w2", "w3": "w13"}
_FUSED_NAMES = {("gate_proj", "up_proj"): "gate_up_proj", ("w1", "w3"): "w13"}


class ExpertRow(NamedTuple):
    """One row of an expert mapping.

    Attributes:
        param_name: part of the parameter's name, "experts.w13_".
        weight_name: part of the tensor's name, "experts.3.gate_proj.".
        expert_id: physical expert. In a row of a fused tensor, which holds all experts, the chunk of its dim 1: 0 for the
            gate, 1 for up.
        shard_id: "w1" gate, "w2" down, "w3" up.
    """

    param_name: str
    weight_name: str
    expert_id: int
    shard_id: ShardId

    @property
    def is_fused(self) -> bool:
        """Whether the tensor holds all experts."""
        return re.search(r"experts\.\d+\.", self.weight_name) is None


class Assignment(NamedTuple):
    """A parameter that a tensor fills, and where.

    Attributes:
        param: its name.
        row: the row that says so.
    """

    param: str
    row: ExpertRow


def expert_params_mapping(
    gate: str | None,
    down: str,
    up: str,
    num_experts: int,
    num_redundant_experts: int = 0,
    *,
    base_layer: bool = False,
    include_fused: bool = False,
) -> list[ExpertRow]:
    """Make the rows of a layer's experts.

    Args:
        gate: the checkpoint's name of the gate projection, "gate_proj" or "w1"; None where experts have no gate.
        down: that of the projection out, "down_proj" or "w2".
        up: that of the other projection in, "up_proj" or "w3".
        num_experts: logical experts E, as numbered in the checkpoint.
        num_redundant_experts: physical experts beyond E, which are copies of 0, 1, ...
        base_layer: whether an adapter wraps the layers, which puts ``base_layer.`` into all names.
        include_fused: also make rows for tensors with the experts, or an expert's gate and up, in one.

    Returns:
        Rows of fused tensors first, then w1, w2, w3 of each physical expert.

    Raises:
        CheckpointError: fused rows are asked for where the names have no known fused form.

    Example:
        >>> for row in expert_params_mapping("w1", "w2", "w3", 1):
        ...     print(tuple(row))
        ('experts.w13_', 'experts.0.w1.', 0, 'w1')
        ('experts.w2_', 'experts.0.w2.', 0, 'w2')
        ('experts.w13_', 'experts.0.w3.', 0, 'w3')
    """
    wrapped = "base_layer." if base_layer else ""
    parts: list[tuple[ShardId, str]] = (
        [("w1", up), ("w2", down)] if gate is None else [("w1", gate), ("w2", down), ("w3", up)]
    )
    rows = []
    both = _fused_name(gate, up) if include_fused else None
    if both is not None:
        halves: list[ShardId] = ["w1", "w3"] if gate is not None else ["w1"]
        prefix = f"experts.{wrapped}"
        rows += [ExpertRow(f"{prefix}w13_weight", f"{prefix}{both}", chunk, half) for chunk, half in enumerate(halves)]
        rows.append(ExpertRow(f"{prefix}w2_weight", f"{prefix}{down}", 0, "w2"))
    for physical, logical in enumerate(initial_physical_to_logical(num_experts, num_redundant_experts)):
        named = parts if both is None or gate is None else [*parts, ("w1", both), ("w3", both)]
        rows += [
            ExpertRow(f"experts.{wrapped}{_STACKS[shard]}_", f"experts.{logical}.{name}.{wrapped}", physical, shard)
            for shard, name in named
        ]
    return rows


def weight_scale_mapping(
    gate: str | None,
    down: str,
    up: str,
    num_experts: int,
    num_redundant_experts: int = 0,
    *,
    scale: str = "weight_scale",
) -> list[ExpertRow]:
    """Make rows of the scales of quantised expert weights alone.

    `expert_params_mapping` covers them too; these rows are for who wants scales and nothing else.

    Args:
        gate: the checkpoint's name of the gate projection; None where experts have no gate.
        down: that of the projection out.
        up: that of the other projection in.
        num_experts: logical experts E.
        num_redundant_experts: physical experts beyond E, which are copies of 0, 1, ...
        scale: the name on disk: "weight_scale" (per tensor, per channel or group), "weight_scale_inv" (blocks), or
            "weight_scale_2" (the second level of nvfp4).

    Raises:
        CheckpointError: no format has a scale of that name.

    Example:
        >>> tuple(weight_scale_mapping("w1", "w2", "w3", 1, scale="weight_scale_inv")[0])
        ('experts.w13_weight_scale_inv', 'experts.0.w1.weight_scale_inv', 0, 'w1')
    """
    return _scale_rows(gate, down, up, num_experts, num_redundant_experts, scale, WEIGHT_SCALES)


def activation_scale_mapping(
    gate: str | None,
    down: str,
    up: str,
    num_experts: int,
    num_redundant_experts: int = 0,
    *,
    scale: str = "input_scale",
) -> list[ExpertRow]:
    """Make rows of the static scales of expert inputs; as `weight_scale_mapping`.

    Args:
        gate: the checkpoint's name of the gate projection; None where experts have no gate.
        down: that of the projection out.
        up: that of the other projection in.
        num_experts: logical experts E.
        num_redundant_experts: physical experts beyond E, which are copies of 0, 1, ...
        scale: the name on disk, "input_scale" or "activation_scale".

    Raises:
        CheckpointError: no format has a scale of that name.
    """
    return _scale_rows(gate, down, up, num_experts, num_redundant_experts, scale, ACTIVATION_SCALES)


def assignments(name: str, rows: Sequence[ExpertRow], params: Collection[str] | None = None) -> list[Assignment]:
    """Find what a checkpoint tensor fills.

    Args:
        name: the tensor.
        rows: from `expert_params_mapping`.
        params: names of the parameters that there are; None checks nothing.

    Returns:
        One assignment for each physical copy of the expert, and for each half of a fused tensor; none if it is no
        expert's tensor. A ``.bias`` of experts that have no bias is none: exporters write zeros there.

    Raises:
        CheckpointError: it is an expert's tensor, and there is no parameter for it.

    Example:
        >>> rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", 16, num_redundant_experts=4)
        >>> [found.row.expert_id for found in assignments("mlp.experts.1.up_proj.weight", rows)]
        [1, 17]
    """
    result: list[Assignment] = []
    for row in rows:
        param = _substitute(name, row)
        if param is None:
            # Rows of one fused tensor stand together. A later row of the same name is about something else.
            if result and result[-1].row.is_fused:
                break
            continue
        if params is not None and param not in params:
            if param.endswith("_bias") and name.endswith(".bias"):
                continue
            raise CheckpointError(
                f"every tensor of an expert needs a parameter; {name!r} would fill {param!r}, which the model does not "
                "have; is the model made for this quantisation, and do its experts have biases?"
            )
        result.append(Assignment(param, row))
    return result


def fused_chunk(tensor: np.ndarray, row: ExpertRow, rows: Sequence[ExpertRow]) -> np.ndarray:
    """Take the part of a tensor that one row is about.

    Args:
        tensor: [E, 2F, D] of all experts, [2F, D] of one, or one that is not split at all.
        row: says which half: by `ExpertRow.expert_id` where the tensor holds all experts, else by its shard.
        rows: the mapping that `row` is from; a tensor is split if it has two rows.

    Returns:
        A view: [E, F, D], [F, D], or the whole.

    Raises:
        CheckpointError: the dim does not split in two, or the row names a chunk that is not 0 or 1.
    """
    halves = {other.shard_id for other in rows if other.weight_name == row.weight_name}
    if halves != {"w1", "w3"}:
        return tensor
    dim, chunk = (1, row.expert_id) if row.is_fused else (0, ("w1", "w3").index(row.shard_id))
    if chunk not in (0, 1) or tensor.shape[dim] % 2:
        raise CheckpointError(
            f"gate and up are chunks 0 and 1 of a dim of even size; got chunk {chunk} of dim {dim} of {tensor.shape} for "
            f"{row.weight_name!r}"
        )
    return np.split(tensor, 2, axis=dim)[chunk]


def scale_index(row: ExpertRow) -> tuple[int, ...]:
    """Place of an expert's per-tensor scale: [E, 2] has the gate's in column 0 and up's in column 1, [E] the down's."""
    return (row.expert_id,) if row.shard_id == "w2" else (row.expert_id, ("w1", "w3").index(row.shard_id))


def per_tensor_scale(scale: np.ndarray) -> np.ndarray:
    """Make a scale of one element, however it was saved, a scalar.

    Raises:
        CheckpointError: it has another number of elements, so that it is not one scale for the tensor.

    Example:
        >>> per_tensor_scale(np.array([0.5])).shape
        ()
    """
    if scale.size != 1:
        raise CheckpointError(f"a per-tensor scale has one element; this one has shape {scale.shape}")
    return scale.reshape(())


def _fused_name(gate: str | None, up: str) -> str | None:
    """What a tensor with gate and up in one is called."""
    if gate is None:
        return up
    if (gate, up) not in _FUSED_NAMES:
        known = " or ".join("/".join(names) for names in _FUSED_NAMES)
        raise CheckpointError(f"gate and up in one have a name for {known}; got {gate}/{up}; leave include_fused out")
    return _FUSED_NAMES[gate, up]


def _scale_rows(
    gate: str | None, down: str, up: str, experts: int, redundant: int, scale: str, known: tuple[str, ...]
) -> list[ExpertRow]:
    if scale not in known:
        raise CheckpointError(f"scales of this kind are called {', '.join(known)}; got {scale!r}")
    return [
        row._replace(param_name=row.param_name + scale, weight_name=row.weight_name + scale)
        for row in expert_params_mapping(gate, down, up, experts, redundant)
    ]


def _substitute(name: str, row: ExpertRow) -> str | None:
    """`name` with the parameter's part in place of the row's, None if the row is not about it."""
    before, found, after = f".{name}".partition(f".{row.weight_name}")
    if not found:
        return None
    # A row that ends inside a component is about that component: exactly, or, of a fused tensor, one of its companions,
    # as gate_up_proj_scale_inv is.
    if not row.weight_name.endswith(".") and after and not (row.is_fused and after[0] in "._"):
        return None
    return f"{before}.{row.param_name}{after}"[1:]
