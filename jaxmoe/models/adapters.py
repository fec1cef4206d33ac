"""The adapters that a model holds beside its weights: their names, and their numbers in its factors."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class HeldAdapter:
    """An adapter that is held.

    Attributes:
        name: name by which prompts choose it.
        path: directory that it was read from.
    """

    name: str
    path: Path


class AdapterPlaces:
    """The adapters by number; a place without one is free.

    All of them compare equal, so that no program is compiled again when one is added to a free place or removed.

    Attributes:
        held: adapter in each place, None in a free one.
    """

    def __init__(self, held: Sequence[HeldAdapter | None] = ()):
        self.held = tuple(held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdapterPlaces)

    def __hash__(self) -> int:
        return hash(AdapterPlaces)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapters, by number."""
        return tuple([adapter.name for adapter in self.held if adapter is not None])

    def number(self, name: Any) -> int:
        """Give the number of an adapter.

        Raises:
            ValueError: there is none of that name.
        """
        for number, adapter in enumerate(self.held):
            if adapter is not None and adapter.name == name:
                return number
        known = ", ".join(map(repr, self.names)) or "none"
        raise ValueError(
            f"an adapter is chosen by the name that it was added with; got {name!r}, and the model holds {known}; add it "
            "with jaxmoe.add_adapter"
        )

    def numbers(self, names: Sequence[str | None], count: int) -> np.ndarray | None:
        """Give int32 [count], the adapter of each sequence, -1 for none; None where no sequence has one.

        Args:
            names: name or None for each sequence.
            count: number of sequences.

        Raises:
            ValueError: there are more or fewer names, or one is of no adapter.
        """
        if isinstance(names, str) or len(names) != count:
            got = repr(names) if isinstance(names, str) else f"{len(names)} of them"
            raise ValueError(f"adapters are a name or None for each of the {count} sequences; got {got}")
        chosen = [-1 if name is None else self.number(name) for name in names]
        return np.array(chosen, np.int32) if max(chosen, default=-1) >= 0 else None
