"""Checks that configs share."""

from typing import Any


def check_positive(config: Any, *names: str) -> None:
    """Refuse a config of which one of the attributes `names` is no whole number of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} is a whole number of at least 1; got {value!r}")
