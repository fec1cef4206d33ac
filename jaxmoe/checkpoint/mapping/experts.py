"""Blocks of expert stacks: the form that a layer's experts have in a checkpoint, and the tensor that fills each slot.

A layer's experts are two parameters, ``w_gate_up`` [P, 2, F, D] (gate, then up) and ``w_down`` [P, D, F], whose
`ParamSpec.rows` is the layer's ``slot_to_expert``; experts without a gate have ``w_gate_up`` [P, 1, F, D], and those with
biases ``b_gate_up`` [P, 2, F] and ``b_down`` [P, D] besides. On disk they are one tensor each per expert, or fused, all
experts in one tensor, in the family's layout of `PATTERNS`.

One checkpoint may use both, in different layers, so each layer is asked on its own.
"""

from collections.abc import Collection, Iterable

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.mapping.blocks import Block
from jaxmoe.checkpoint.mapping.layouts import PATTERNS, only_layout, shape_of, split_of
from jaxmoe.checkpoint.nearest import nearest_name
from jaxmoe.layers.param import ParamSpec
from jaxmoe.models import ExpertTensors, Form


def find_expert_layout(names: ExpertTensors, tensors: Collection[str], num_experts: int) -> Form:
    """Find the form of one layer's experts by the names that are there.

    Args:
        names: names of this layer.
        tensors: names in the checkpoint.
        num_experts: logical experts E.

    Returns:
        The form of which anything is there. That it is complete is checked by the plan, with everything else.

    Raises:
        CheckpointError: both forms are there, or neither.
    """
    per_expert = (name for expert in range(num_experts) for name in names.per_expert(expert))
    candidates: dict[Form, Iterable[str]] = {"fused": names.fused, "per_expert": per_expert}
    found = {form: name for form, own in candidates.items() if (name := next(filter(tensors.__contains__, own), None))}
    if not found:
        known = [own[0] for own in (names.fused, names.per_expert(0)) if own]
        nearest = next(filter(None, [nearest_name(name, tensors) for name in reversed(known)]), None)
        there = f"the nearest is {nearest!r}" if nearest else f"it has {', '.join(map(repr, sorted(tensors)[:3]))}"
        raise CheckpointError(
            f"the experts of a layer must be there as {' or as '.join(map(repr, known))} and so on; the checkpoint has "
            f"{'neither' if len(known) == 2 else 'none'}, nor names of other tools that jaxmoe knows: {there}; does its "
            "config.json belong to it? If so, give the tensors one of these names"
        )
    return only_layout(found)


def expert_blocks(
    gate_up: ParamSpec,
    down: ParamSpec,
    names: ExpertTensors,
    tensors: Collection[str],
    *,
    gate_up_bias: ParamSpec | None = None,
    down_bias: ParamSpec | None = None,
) -> list[Block]:
    """Blocks of one layer's expert stacks, from whichever form the layer has.

    Args:
        gate_up: ``w_gate_up`` [P, 2, F, D], or [P, 1, F, D] of experts without a gate.
        down: ``w_down`` [P, D, F].
        names: names of this layer.
        tensors: names in the checkpoint.
        gate_up_bias: ``b_gate_up`` [P, 2, F], or [P, 1, F].
        down_bias: ``b_down`` [P, D].

    Raises:
        CheckpointError: as `find_expert_layout`.
    """
    stacks = _Stacks(gate_up, down, names)
    fused = find_expert_layout(names, tensors, stacks.sizes["E"]) == "fused"
    blocks = stacks.fused_blocks() if fused else stacks.per_expert_blocks()
    if gate_up_bias is not None and down_bias is not None:
        bias_blocks = stacks.fused_bias_blocks if fused else stacks.per_expert_bias_blocks
        blocks += bias_blocks(gate_up_bias, down_bias)
    return blocks


def per_expert_blocks(gate_up: ParamSpec, down: ParamSpec, names: ExpertTensors) -> list[Block]:
    """Blocks of one layer's expert stacks from one tensor each per expert; arguments as `expert_blocks`."""
    return _Stacks(gate_up, down, names).per_expert_blocks()


def fused_expert_blocks(gate_up: ParamSpec, down: ParamSpec, names: ExpertTensors) -> list[Block]:
    """Blocks of one layer's expert stacks from the family's fused layout; arguments as `expert_blocks`."""
    return _Stacks(gate_up, down, names).fused_blocks()


class _Stacks:
    """The stacks of one layer, which belong together, and where they come from."""

    def __init__(self, gate_up: ParamSpec, down: ParamSpec, names: ExpertTensors) -> None:
        slots, model, width = down.shape
        halves = gate_up.shape[1]
        assert gate_up.shape == (slots, halves, width, model), f"{gate_up.path} {gate_up.shape} with {down.shape}"
        assert gate_up.rows == down.rows, f"{gate_up.path} and {down.path} hold different experts"
        assert down.source_groups is not None, f"{down.path}: rows without source_groups"
        self.gate_up, self.down, self.names = gate_up, down, names
        self.halves = range(halves)
        self.sizes = {"E": down.source_groups, "2": halves, "F": width, "D": model}

    def per_expert_blocks(self) -> list[Block]:
        """Blocks from one tensor each per expert."""
        pattern, blocks = PATTERNS["per_expert"], []
        for slot, expert in _filled_slots(self.down):
            *halves, down = self.names.per_expert(expert)
            for half, name in zip(self.halves, halves, strict=True):
                blocks.append(self._block(self.gate_up, "E2FD", pattern.up, name, slot, expert, half))
            blocks.append(self._block(self.down, "EDF", pattern.down, down, slot, expert))
        return blocks + _padding_blocks(self.gate_up) + _padding_blocks(self.down)

    def fused_blocks(self) -> list[Block]:
        """Blocks from the family's fused layout."""
        pattern = PATTERNS[self.names.fused_layout]
        *ups, down = self.names.fused_weights
        return self._from_fused(self.gate_up, "E2FD", pattern.up, ups) + self._from_fused(
            self.down, "EDF", pattern.down, [down]
        )

    def per_expert_bias_blocks(self, gate_up: ParamSpec, down: ParamSpec) -> list[Block]:
        """Blocks of the biases that go with `per_expert_blocks`."""
        pattern, blocks = PATTERNS["per_expert"].biases, []
        for slot, expert in _filled_slots(down):
            *halves, last = self.names.per_expert_biases(expert)
            for half, name in zip(self.halves, halves, strict=True):
                blocks.append(self._block(gate_up, "E2F", pattern.up, name, slot, expert, half))
            blocks.append(self._block(down, "ED", pattern.down, last, slot, expert))
        return blocks + _padding_blocks(gate_up) + _padding_blocks(down)

    def fused_bias_blocks(self, gate_up: ParamSpec, down: ParamSpec) -> list[Block]:
        """Blocks of the biases that go with `fused_blocks`."""
        pattern = PATTERNS[self.names.fused_layout].biases
        *ups, name = self.names.fused_biases
        return self._from_fused(gate_up, "E2F", pattern.up, ups) + self._from_fused(down, "ED", pattern.down, [name])

    def _from_fused(self, spec: ParamSpec, letters: str, pattern: str, tensors: list[str]) -> list[Block]:
        """One block per slot and tensor: gate and up are in one tensor or in two."""
        blocks = [
            self._block(spec, letters, pattern, name, slot, expert, half)
            for slot, expert in _filled_slots(spec)
            for half, name in enumerate(tensors)
        ]
        return blocks + _padding_blocks(spec)

    def _block(
        self, spec: ParamSpec, letters: str, pattern: str, name: str, slot: int, expert: int, half: int = 0
    ) -> Block:
        """The block of one expert: its part of tensor `name`, of dims `pattern`, and a slot of a stack of dims `letters`."""
        split = split_of(pattern, self.sizes)
        parts = pattern.replace(" ", "")
        # What is no dim of the tensor is one place of the stack, and so is always the slot.
        single = {"E", *letters} - set(parts) | {"E"}
        return Block(
            param=spec.path,
            param_start=tuple([{"E": slot, "2": half}.get(letter, 0) for letter in letters]),
            shape=tuple([1 if letter in single else size for letter, size in zip(letters, spec.shape, strict=True)]),
            tensor=name,
            tensor_shape=shape_of(pattern, self.sizes),
            tensor_start=tuple([expert if letter == "E" else 0 for letter in parts]),
            dims=tuple([letters.index(letter) for letter in parts]),
            tensor_split=split if len(parts) > len(split) else (),
        )


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
