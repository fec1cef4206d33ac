"""Covering sets: few cases in which every value, or every pair of values, of a product's factors still occurs."""

import itertools
from collections.abc import Hashable, Mapping, Sequence

Case = Mapping[str, Hashable]


def covering(cases: Sequence[Case], strength: int = 1, most: int | None = None) -> list[int]:
    """Choose few of the cases so that all combinations that occur in any occur in a chosen one.

    Args:
        cases: value by factor; a factor may be missing in some.
        strength: factors that a combination takes: 1 for every value, 2 for every pair of values.
        most: cases to stop at, those that add most having come first.

    Returns:
        Positions of the chosen cases, ascending. The choice is greedy and always the same: the case that adds most
        combinations comes next, the first of those that add as many.
    """
    combinations = [
        {*itertools.combinations(sorted(case.items(), key=lambda item: item[0]), min(strength, len(case)))}
        for case in cases
    ]
    missing = set().union(*combinations)
    chosen: list[int] = []
    while missing and (most is None or len(chosen) < most):
        best = max(range(len(cases)), key=lambda i: (len(combinations[i] & missing), -i))
        chosen.append(best)
        missing -= combinations[best]
    return sorted(chosen)


def pairs(*factors: Sequence) -> list[tuple]:
    """Few cases of the product of some lists, in which every two values of two of them meet."""
    cases = [*itertools.product(*map(range, map(len, factors)))]
    chosen = covering([{str(i): value for i, value in enumerate(case)} for case in cases], strength=2)
    return [tuple(factor[i] for factor, i in zip(factors, cases[j], strict=True)) for j in chosen]


def factors(arguments: Mapping[str, object]) -> dict[str, Hashable]:
    """The factors of a parametrized test's arguments: each argument, and each entry of one that is a dict."""
    result: dict[str, Hashable] = {}
    for name, value in arguments.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        result |= {f"{name}.{key}": getattr(entry, "__name__", None) or repr(entry) for key, entry in entries}
    return result
