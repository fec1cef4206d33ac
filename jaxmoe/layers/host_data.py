"""Host-side data that a module carries and no compiled program depends on."""

from typing import Generic, TypeVar

T = TypeVar("T")


class HostData(Generic[T]):
    """A value beside a module's parameters that must not cause a recompilation when it changes.

    Flax makes every plain attribute part of the structure by which a compiled program is found
    again. Two `HostData` are equal whatever they hold, so that a model with another placement,
    source or report still finds its programs.
    """

    def __init__(self, value: T):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HostData)

    def __hash__(self) -> int:
        return hash(HostData)
