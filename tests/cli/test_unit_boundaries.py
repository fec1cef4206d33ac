"""Sizes as commands show and read them: every unit, on both sides of where it begins."""

import pytest

from jaxmoe.checkpoint.saving.write import parse_size
from jaxmoe.cli.units import show_bytes, show_count


@pytest.mark.parametrize(("power", "unit"), [(3, "kB"), (6, "MB"), (9, "GB"), (12, "TB")])
def test_bytes_are_in_powers_of_1000(power, unit):
    assert show_bytes(10**power) == f"1 {unit}"
    assert show_bytes(2.5 * 10**power) == f"2.5 {unit}"
    assert not show_bytes(10**power - 1).endswith(unit)


@pytest.mark.parametrize(("power", "unit"), [(6, "M"), (9, "B"), (12, "T")])
def test_counts_are_in_powers_of_1000(power, unit):
    assert show_count(10**power) == f"1{unit}"
    assert not show_count(10**power - 1).endswith(unit)


SIZES = {
    "3": 3,
    "3KB": 3000,
    "3MB": 3 * 10**6,
    "0.5mb": 500_000,
    "3GB": 3 * 10**9,
    "3TB": 3 * 10**12,
    "3KiB": 3 * 2**10,
    "3MiB": 3 * 2**20,
    "3 gib ": 3 * 2**30,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_a_file_size_in_every_unit(text, size):
    assert parse_size(text) == size
