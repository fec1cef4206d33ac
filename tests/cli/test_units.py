"""Examples of how commands show numbers."""

import doctest

from jaxmoe import cli_inspect, cli_units


def test_examples() -> None:
    for module in (cli_units, cli_inspect):
        results = doctest.testmod(module)
        assert results.attempted
        assert not results.failed
