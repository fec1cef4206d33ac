"""Host objects that belong to one model object: no copy of it has them, and no compiled program depends on them."""

from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from flax import nnx

T = TypeVar("T")


class Belongings(Generic[T]):
    """At most one value for each of some modules, held as long as the module is.

    Everything set on an nnx module is part of its graph: it would be shared by copies (`nnx.clone`, `nnx.merge`),
    and `nnx.jit` would give one module what another one had when the program was compiled.
    """

    def __init__(self) -> None:
        self._values: WeakKeyDictionary[nnx.Module, T] = WeakKeyDictionary()

    def of(self, module: nnx.Module) -> T | None:
        """Look up the module's value; None where it has none."""
        return self._values.get(module)

    def give(self, module: nnx.Module, value: T | None) -> None:
        """Set the module's value; None takes it away."""
        if value is None:
            self._values.pop(module, None)
        else:
            self._values[module] = value
