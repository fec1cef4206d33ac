"""Examples of how commands show numbers."""

import doctest

from jaxmoe.cli import inspect, units


def test_examples() -> None:
    for module in (units, inspect):
        results = doctest.testmod(module)
        assert results.attempted
        assert not results.failed
