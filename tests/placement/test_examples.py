"""The examples in the docstrings are true."""

import doctest
import importlib
import pkgutil

import pytest

import jaxmoe.placement

MODULES = ["jaxmoe.placement"]
MODULES += sorted(module.name for module in pkgutil.walk_packages(jaxmoe.placement.__path__, "jaxmoe.placement."))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
