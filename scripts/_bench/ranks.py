"""How far two orders of the same things agree: rank correlations, and pairs that one of them turns round."""

import itertools
from collections.abc import Mapping

import numpy as np


def spearman(ones: Mapping[str, float], others: Mapping[str, float]) -> float:
    """Correlation of the ranks of two values of each thing, from -1 to 1; equal values share the mean of their ranks.

    >>> round(spearman({"a": 1, "b": 2, "c": 3}, {"a": 10, "b": 30, "c": 20}), 3)
    0.5
    """
    ranks = [_ranks(np.array([values[name] for name in ones])) for values in (ones, others)]
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.array([np.sum(values < value) + (np.sum(values == value) - 1) / 2 for value in values])


def kendall(ones: Mapping[str, float], others: Mapping[str, float]) -> float:
    """Pairs in the same order less pairs in the other, over all pairs that neither has equal (Kendall's tau-b).

    >>> round(kendall({"a": 1, "b": 2, "c": 3}, {"a": 10, "b": 30, "c": 20}), 3)
    0.333
    """
    signs = np.array(
        [
            [np.sign(values[first] - values[second]) for values in (ones, others)]
            for first, second in itertools.combinations(ones, 2)
        ]
    )
    apart = np.sqrt(np.prod(np.count_nonzero(signs, axis=0)))
    return float(np.sum(signs[:, 0] * signs[:, 1]) / apart)


def turned_round(
    measured: Mapping[str, float], modeled: Mapping[str, float], factor: float
) -> tuple[list[tuple[str, str]], int]:
    """Find the pairs that the model has in the other order, of those whose measured values clearly differ.

    Args:
        measured: value of each thing.
        modeled: value of each by the model.
        factor: least ratio of two measured values that differ clearly.

    Returns:
        Pairs (smaller, larger) by measurement of which the model has the larger no larger, and the number of pairs that
        differ clearly.

    >>> turned_round({"a": 1, "b": 2, "c": 2.5}, {"a": 1, "b": 3, "c": 0.5}, 1.5)
    ([('a', 'c')], 2)
    """
    clear = [pair for pair in itertools.permutations(measured, 2) if measured[pair[1]] >= factor * measured[pair[0]]]
    return [(small, large) for small, large in clear if modeled[large] <= modeled[small]], len(clear)
