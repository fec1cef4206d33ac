"""The name that was perhaps meant, for messages about a name that is not there."""

import difflib
import re
from collections.abc import Iterable

_NUMBER = re.compile(r"\d+")


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The one of `names` that is most like `name`, None where none is much like it.

    Layers and experts repeat a few names thousands of times, so names are compared without their numbers first.

    Example:
        >>> nearest_name("layers.7.attn.q_proj", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "norm"])
        'layers.1.self_attn.q_proj'
    """
    by_pattern: dict[str, list[str]] = {}
    for candidate in names:
        by_pattern.setdefault(_NUMBER.sub("#", candidate), []).append(candidate)
    patterns = difflib.get_close_matches(_NUMBER.sub("#", name), by_pattern, n=1)
    if not patterns:
        return None
    wanted = _numbers(name)

    def distance(candidate: str) -> list[int]:
        # Where the two have not equally many numbers, those that both have decide.
        return [abs(a - b) for a, b in zip(_numbers(candidate), wanted, strict=False)]

    return min(by_pattern[patterns[0]], key=distance)


def _numbers(name: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(name)]
