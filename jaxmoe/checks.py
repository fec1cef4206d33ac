"""Checks of arguments: a wrong kind, number or name is refused with the argument's name; NumPy's scalars are welcome."""

import math
import numbers
import operator
import os
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np


def integer(name: str, value: Any, *, least: int | None = None, most: int | None = None) -> int:
    """`value` as an int, from `least` to `most`.

    Raises:
        ValueError: it is no integer, or outside of these.
    """
    try:
        # Whatever counts as an index: int, NumPy's integers, elements of integer arrays. A bool is a mistake.
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise ValueError(f"{name} is an integer{_within(least, most)}; got {value!r:.80}")
    return number


def real_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    note: str = "",
) -> float:
    """`value` as a finite float, from `least` (or `above` it) to `most`; `note` follows the rule in the message.

    Raises:
        ValueError: it is no number, not finite, or outside of these.
    """
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        number = float(value)
    # Written so that NaN fails each of them.
    holds = (
        math.isfinite(number)
        and (least is None or number >= least)
        and (most is None or number <= most)
        and (above is None or number > above)
    )
    if not holds:
        rule = (
            _within(least, most) if above is None else f" above {above}{'' if most is None else f' and at most {most}'}"
        )
        raise ValueError(f"{name} is a finite number{rule}{note}; got {value!r:.80}")
    return number


def flag(name: str, value: Any) -> bool:
    """`value` as a bool.

    Raises:
        ValueError: it is neither True nor False.
    """
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is True or False; got {value!r:.80}")
    return bool(value)


def one_of(name: str, value: Any, names: Collection[str]) -> str:
    """`value`, a name of a closed set.

    Raises:
        ValueError: it is none of them.
    """
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{name} is one of {', '.join(names)}; got {value!r:.80}")
    return value


def instance_of(name: str, value: Any, kinds: type | tuple[type, ...], what: str) -> None:
    """Refuse a value that is not of one of `kinds`; `what` says what it is, and where to get one.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} is {what}; got {type(value).__name__}")


def path_like(name: str, value: Any) -> None:
    """Refuse what is no path.

    Raises:
        TypeError: it is no text and no path object.
    """
    instance_of(name, value, (str, os.PathLike), "a path, a text or a pathlib.Path")


def check_positive(config: Any, *names: str) -> None:
    """Make the attributes `names` of a frozen config ints, refused where one is no integer of at least 1."""
    for name in names:
        value = integer(f"{type(config).__name__}.{name}", getattr(config, name), least=1)
        object.__setattr__(config, name, value)


def check_flags(config: Any, *names: str) -> None:
    """Make the attributes `names` of a frozen config bools, refused where one is neither True nor False."""
    for name in names:
        object.__setattr__(config, name, flag(f"{type(config).__name__}.{name}", getattr(config, name)))


def token_ids(name: str, values: Any, vocab_size: int) -> frozenset[int]:
    """One token id or several as a set.

    Raises:
        ValueError: one is no integer of the vocabulary.
    """
    several = isinstance(values, Iterable) and not isinstance(values, str | bytes) and getattr(values, "ndim", 1) != 0
    given = values if several else [values]
    return frozenset(integer(name, token, least=0, most=vocab_size - 1) for token in given)


def _within(least: float | None, most: float | None) -> str:
    if most is not None:
        return f" from {least} to {most}"
    return "" if least is None else f" of at least {least}"
