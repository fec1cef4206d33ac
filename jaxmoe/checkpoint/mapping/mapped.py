"""A checkpoint mapped to the parameters of a model, and the proof that the one fills the other; no value is read."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxmoe.checkpoint.boxes import Box
from jaxmoe.checkpoint.errors import Problems
from jaxmoe.checkpoint.formats import (
    Checkpoint,
    DecodedTensor,
    Split,
)
from jaxmoe.checkpoint.mapping.blocks import Block
from jaxmoe.checkpoint.mapping.checks import check_filled_once, check_tensors, check_used_whole
from jaxmoe.checkpoint.mapping.ignore import IgnoreRule
from jaxmoe.layers import ParamSpec


class Unused(NamedTuple):
    """The tensors of a checkpoint that fill no parameter.

    Attributes:
        ignored: {rule: tensors that it covers}.
        uncovered: tensors that no rule covers.
    """

    ignored: dict[str, tuple[str, ...]]
    uncovered: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MappedCheckpoint:
    """The tensors of a checkpoint, the parameters of a model, and the blocks by which the ones fill the others.

    Attributes:
        checkpoint: tensors by name.
        specs: parameters by path.
        blocks: {path of a parameter: blocks that fill it}.
        rules: rules for tensors that are not needed; the first that matches counts, and a tensor that a block names is
            never ignored.
        complete: whether all of a model is filled; a part of one may leave tensors over.
        copies: {tensor: number of tensors that it stands for}, of those that stand for the like ones of other experts.
    """

    checkpoint: Checkpoint
    specs: Mapping[str, ParamSpec]
    blocks: Mapping[str, Sequence[Block]]
    rules: tuple[IgnoreRule, ...] = ()
    complete: bool = True
    copies: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        specs: Iterable[ParamSpec],
        blocks: Iterable[Block],
        rules: Iterable[IgnoreRule] = (),
        *,
        complete: bool = True,
    ) -> "MappedCheckpoint":
        """Gather parameters and blocks by path."""
        by_path = {spec.path: spec for spec in specs}
        filling: dict[str, list[Block]] = {path: [] for path in by_path}
        for block in blocks:
            filling.setdefault(block.param, []).append(block)
        return cls(checkpoint=checkpoint, specs=by_path, blocks=filling, rules=tuple(rules), complete=complete)

    def part(self, specs: Mapping[str, ParamSpec]) -> "MappedCheckpoint":
        """The same for some of the parameters, each with its blocks; what fills the others may be left over."""
        blocks = {path: self.blocks[path] for path in specs}
        return dataclasses.replace(self, specs=specs, blocks=blocks, complete=False)

    def used_blocks(self) -> Iterable[tuple[str, Block]]:
        """(tensor, block) for every block of a parameter that a tensor fills."""
        for path in self.specs:
            for block in self.blocks[path]:
                if block.tensor is not None:
                    yield block.tensor, block

    def splits(self) -> dict[str, Split]:
        """{tensor: the dims that its dims are split in}, for those that are; see `Block`."""
        splits: dict[str, Split] = {}
        for name, block in self.used_blocks():
            split = splits.setdefault(name, block.tensor_split)
            assert split == block.tensor_split, f"{name!r} is split as {split} and {block.tensor_split}"
        return {name: split for name, split in splits.items() if split}

    def formats(self, packings: Collection[str]) -> tuple[dict[str, int], dict[str, int]]:
        """Count the quantized weights by format: those that only fill parameters of `packings`, and the others."""
        kept: dict[str, bool] = {}
        for name, block in self.used_blocks():
            if isinstance(self.checkpoint.tensors.get(name), DecodedTensor):
                kept[name] = kept.get(name, True) and block.param in packings
        counts: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
        for name, packed in kept.items():
            counts[not packed][self.checkpoint.tensors[name].form] += 1
        return dict(counts[0]), dict(counts[1])

    def unused(self) -> Unused:
        """Find the tensors that fill no parameter, and the rules that ignore them."""
        used = {name for name, _ in self.used_blocks()}
        ignored: dict[str, list[str]] = defaultdict(list)
        uncovered = []
        for name in self.checkpoint.tensors:
            if name in used:
                continue
            rule = next((rule.name for rule in self.rules if rule.matches(name)), None)
            if rule is None:
                uncovered.append(name)
            else:
                ignored[rule].append(name)
        return Unused({rule: tuple(names) for rule, names in ignored.items()}, tuple(uncovered))

    def check(self, problems: Problems) -> Unused:
        """Note all that keeps the tensors from filling the parameters, each element of both exactly as it should.

        Every tensor that a block names is there, with the shape that the block expects and in plain numbers. Every
        element of it fills something. Every other tensor is ignored by a rule. Every element of a parameter is filled
        by one block.

        Args:
            problems: list that gets what is wrong.

        Returns:
            The tensors that are left over; of a part of a model, which may leave any, none.
        """
        for path in self.blocks.keys() - self.specs.keys():
            names = sorted({str(block.tensor) for block in self.blocks[path]})
            problems.add(f"tensor {names[0]!r} is to fill {path!r}, which the model does not have")
        tensors = self.checkpoint.tensors
        for path, spec in self.specs.items():
            check_tensors(tensors, spec, self.blocks[path], problems)
        unused = self.unused() if self.complete else Unused({}, ())
        for name in unused.uncovered:
            problems.add(f"tensor {name!r} {tensors[name].shape} fills no parameter and no rule ignores it")
        if self.complete:
            used: dict[str, dict[Box, None]] = defaultdict(dict)
            for name, block in self.used_blocks():
                used[name][block.tensor_box] = None
            splits = self.splits()
            for name, boxes in used.items():
                if name in tensors:
                    check_used_whole(tensors[name], tuple(boxes), splits.get(name, ()), problems)
        for path, spec in self.specs.items():
            check_filled_once(spec, self.blocks[path], problems)
        return unused
