"""Packages that share their name with the function they are there for."""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


def make_callable(package: str) -> None:
    """Let calling a package call its function of the same name.

    ``jaxmoe.generate`` is a function to callers, and Python binds the package to the same name as soon
    as something imports from it. Whichever of the two was bound last, ``jaxmoe.generate(model, prompts)`` generates.

    Args:
        package: its ``__name__``.
    """
    sys.modules[package].__class__ = _CallablePackage
