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
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Literal, NamedTuple

from jaxmoe.interop.expert_maps import initial_physical_to_logical

ShardId = Literal["w1", "w2", "w3"]
"""Gate (or the only projection in, where there is no gate), down, up."""

_STACKS: dict[ShardId, str] = {"w1": "w13", "w2": "w2", "w3": "w13"}
_FUSED_NAMES = {("gate_proj", "up_proj"): "gate_up_proj", ("w1", "w3"): "w13"}
# Parts of a fused tensor that belong to a parameter whose name does not begin with that of the weights.
_FUSED_PARTS = {"_bias": "bias", "_blocks": "weight", "_scales": "weight_scale"}
# Names of gate, down and up that checkpoints have. One without a gate is told by having none of the others.
_NAMINGS: tuple[tuple[str | None, str, str], ...] = (
    ("gate_proj", "down_proj", "up_proj"),
    ("w1", "w2", "w3"),
    ("linear", "linear_1", "linear_v"),
    (None, "down_proj", "up_proj"),
)
_NAME = re.compile(
    r"(?P<prefix>(?:.*\.)?experts)\.(?P<wrapped>base_layer\.)?(?:(?P<expert>0|[1-9]\d*)\.)?(?P<part>[^.]+)"
)


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
        param: name of the parameter.
        row: row of the mapping that says so.
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
        gate: name of the gate projection in the checkpoint, "gate_proj" or "w1"; None where experts have no gate.
        down: name of the projection out, "down_proj" or "w2".
        up: name of the other projection in, "up_proj" or "w3".
        num_experts: logical experts E, as numbered in the checkpoint.
        num_redundant_experts: physical experts beyond E, which are copies of 0, 1, ...
        base_layer: flag that says that an adapter wraps the layers, which puts ``base_layer.`` into all names.
        include_fused: flag that asks for rows of tensors with the experts, or an expert's gate and up, in one.

    Returns:
        Rows of fused tensors first, then w1, w2, w3 of each physical expert.

    Raises:
        ValueError: fused rows are asked for where the names have no known fused form.

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


def assignments(name: str, rows: Iterable[ExpertRow]) -> list[Assignment]:
    """Find what a checkpoint tensor fills.

    Args:
        name: name of the tensor.
        rows: rows from `expert_params_mapping`.

    Returns:
        One assignment for each physical copy of the expert, and for each half of a fused tensor; none if it is no
        expert's tensor.

    Example:
        >>> rows = expert_params_mapping("gate_proj", "down_proj", "up_proj", 16, num_redundant_experts=4)
        >>> [found.row.expert_id for found in assignments("mlp.experts.1.up_proj.weight", rows)]
        [1, 17]
    """
    result: list[Assignment] = []
    for row in rows:
        param = _substitute(name, row)
        if param is not None:
            result.append(Assignment(param, row))
        elif result and result[-1].row.is_fused:
            # Rows of one fused tensor stand together. A later row of the same name is about something else.
            break
    return result


def map_names(names: Iterable[str], num_redundant_experts: int = 0) -> dict[str, list[Assignment]]:
    """Find what each tensor of a checkpoint's routed experts fills, from the names alone.

    Each layer's own names tell how it calls its projections, how many experts it has, and whether they are fused.

    Args:
        names: names of all tensors of a checkpoint. Those that are not under a component "experts" are left out.
        num_redundant_experts: physical experts beyond E in every layer.

    Returns:
        The assignments of each tensor; [] where vLLM's mapping has no row for it.

    Example:
        >>> found = map_names(["mlp.experts.0.w1.weight", "mlp.experts.0.w2.weight", "mlp.gate.weight"])
        >>> [(one.param, one.row.expert_id, one.row.shard_id) for (one,) in found.values()]
        [('mlp.experts.w13_weight', 0, 'w1'), ('mlp.experts.w2_weight', 0, 'w2')]
    """
    layers: dict[str, list[re.Match[str]]] = defaultdict(list)
    for name in names:
        found = _NAME.match(name)
        if found:
            layers[found["prefix"]].append(found)
    result = {}
    rows_of_layer = cache(_rows_of_layer)  # Most layers are alike.
    for tensors in layers.values():
        rows = rows_of_layer(
            _naming({found["part"] for found in tensors}),
            1 + max((int(found["expert"]) for found in tensors if found["expert"]), default=0),
            num_redundant_experts,
            any("base_layer." in found.string for found in tensors),
        )
        for found in tensors:
            result[found.string] = assignments(found.string, rows.get(found["expert"], ()))
    return result


def _naming(parts: set[str]) -> tuple[str | None, str, str] | None:
    """Tell the one of `_NAMINGS` that a layer has, whose tensors' names go on with `parts`; None for none of them."""
    for gate, down, up in _NAMINGS:
        both = up if gate is None else _FUSED_NAMES.get((gate, up), gate)
        if any(part == name or part.startswith(f"{name}_") for part in parts for name in {gate or up, both}):
            return gate, down, up
    return None


def _rows_of_layer(
    naming: tuple[str | None, str, str] | None, num_experts: int, num_redundant_experts: int, base_layer: bool
) -> dict[str | None, list[ExpertRow]]:
    """Rows by the logical expert that is named in them, None in those of fused tensors."""
    if naming is None:
        return {}
    gate, down, up = naming
    rows: dict[str | None, list[ExpertRow]] = defaultdict(list)
    for row in expert_params_mapping(
        gate,
        down,
        up,
        num_experts,
        num_redundant_experts,
        base_layer=base_layer,
        include_fused=gate is None or (gate, up) in _FUSED_NAMES,
    ):
        found = _NAME.match(row.weight_name)
        assert found, row
        rows[found["expert"]].append(row)
    return rows


def _fused_name(gate: str | None, up: str) -> str | None:
    """The name of a tensor with gate and up in one."""
    if gate is None:
        return up
    if (gate, up) not in _FUSED_NAMES:
        known = " or ".join("/".join(names) for names in _FUSED_NAMES)
        raise ValueError(f"gate and up in one have a name for {known}; got {gate}/{up}; leave include_fused out")
    return _FUSED_NAMES[gate, up]


def _substitute(name: str, row: ExpertRow) -> str | None:
    """`name` with the parameter's part in place of the row's, None if the row is not about it."""
    before, found, after = f".{name}".partition(f".{row.weight_name}")
    if not found:
        return None
    # A row that ends inside a component is about that component: exactly, or, of a fused tensor, one of its companions,
    # as gate_up_proj_scale_inv is.
    if not row.weight_name.endswith(".") and after and not (row.is_fused and after[0] in "._"):
        return None
    if row.is_fused and after in _FUSED_PARTS:
        return f"{before}.{row.param_name.removesuffix('weight')}{_FUSED_PARTS[after]}"[1:]
    return f"{before}.{row.param_name}{after}"[1:]
