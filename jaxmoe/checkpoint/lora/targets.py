"""The tensors of a checkpoint as an adapter means them: under the names that transformers has for them.

An adapter of a fused parameter [E, d1, d2] means the matrices of all experts. The checkpoint may have them in one tensor, in
one tensor for gate and one for up, or in a tensor or two for each expert.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from jaxmoe.checkpoint.boxes import Box
from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.lora.pairs import Shape
from jaxmoe.checkpoint.nearest import nearest_name

# Gate, up and down of one expert.
NAMINGS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A matrix of a checkpoint tensor that is one expert's matrix of a fused parameter, or rows of it from `start`."""

    target: str
    box: Box
    expert: int
    start: int


class TargetTensors:
    """The tensors of a checkpoint, looked up by the names that transformers has for them.

    Args:
        tensors: name -> shape of the checkpoint's.
        rename: function from the name that a parameter has in transformers to the name on disk.
    """

    def __init__(self, tensors: Mapping[str, Shape], rename: Callable[[str], str]) -> None:
        self.tensors = tensors
        self.rename = rename
        # An adapter for another model misses thousands of names: the first tells as much as all of them.
        self._suggest = True

    def missing(self, what: str, name: str, hint: str = "is the adapter for this model?") -> CheckpointError:
        """The error that `name` is not there."""
        nearest = nearest_name(name, self.tensors) if self._suggest else None
        self._suggest = False
        suggestion = f"; the nearest is {nearest!r}" if nearest else ""
        return CheckpointError(f"{what} must be in the checkpoint; {name!r} is not{suggestion}; {hint}")

    def find(self, *names: str) -> str | None:
        """The name on disk of the first that is there."""
        return next((name for name in map(self.rename, names) if name in self.tensors), None)

    def fused(self, module: str, parameter: str) -> tuple[Shape, list[Piece]]:
        """Shape [E, d1, d2] of a fused parameter, and where its matrices are: in a fused tensor or one of each expert."""
        name = self.find(f"{module}.{parameter}", f"{module}.{parameter}.weight")
        if name is not None:
            shape = self.tensors[name]
            if len(shape) != 3:
                raise CheckpointError(f"a parameter of all experts has 3 dims; {name!r} has shape {shape}")
            experts, rows, columns = shape
            boxes = [((expert, expert + 1), (0, rows), (0, columns)) for expert in range(experts)]
            return shape, [Piece(name, box, expert, 0) for expert, box in enumerate(boxes)]
        halves = [self.find(f"{module}.{half}_proj", f"{module}.{half}_proj.weight") for half in ("gate", "up")]
        if parameter == "gate_up_proj" and None not in halves:
            return self.stacked(halves)
        for gate, up, down in NAMINGS:
            parts = {"gate_up_proj": (gate, up), "down_proj": (down,), "up_proj": (up,)}.get(parameter, ())
            if parts and self.find(f"{module}.0.{parts[0]}.weight"):
                return self.per_expert(module, parts)
        name = self.rename(f"{module}.{parameter}")
        raise self.missing("an adapted parameter, or its experts one by one,", name)

    def stacked(self, names: Sequence[str | None]) -> tuple[Shape, list[Piece]]:
        """The same of experts in a tensor for each half, which follow each other in the fused parameter."""
        pieces: list[Piece] = []
        start = experts = columns = 0
        for name in filter(None, names):
            experts, rows, columns = self.tensors[name]
            for expert in range(experts):
                pieces.append(Piece(name, ((expert, expert + 1), (0, rows), (0, columns)), expert, start))
            start += rows
        return (experts, start, columns), pieces

    def per_expert(self, module: str, parts: tuple[str, ...]) -> tuple[Shape, list[Piece]]:
        """The same of experts that have a tensor each, or two that follow each other in the fused parameter."""
        pieces: list[Piece] = []
        start = columns = 0
        for expert in itertools.count():
            names = [self.find(f"{module}.{expert}.{part}.weight") for part in parts]
            if None in names:
                return (expert, start, columns), pieces
            start = 0
            for name in filter(None, names):
                rows, columns = self.tensors[name]
                pieces.append(Piece(name, ((0, rows), (0, columns)), expert, start))
                start += rows
        raise AssertionError("counting never ends")
