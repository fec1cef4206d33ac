"""The n-gram models against their formula, written out over dictionaries."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from scripts._train.baselines import NGramModel

V = 7


def streams(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    train = rng.choice(V - 1, size=400, p=np.arange(1, V) / np.arange(1, V).sum()).astype(np.int32)
    return train, rng.integers(0, V, 60).astype(np.int32)  # with a token that was never seen


def kneser_ney(train: list[int], order: int):
    """P(token | context) by the definition."""
    counts = {order: Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])
    discounts, followers, totals = {}, defaultdict(int), defaultdict(int)
    for n, table in counts.items():
        once, twice = (sum(count == i for count in table.values()) for i in (1, 2))
        discounts[n] = once / (once + 2 * twice) if once else 0.5
        for gram, count in table.items():
            followers[gram[:-1]] += 1
            totals[gram[:-1]] += count

    def probability(context: tuple[int, ...], token: int) -> float:
        lower = probability(context[1:], token) if context else 1 / V
        n, total = len(context) + 1, totals.get(context, 0)
        if not total:
            return lower
        count = counts[n].get((*context, token), 0)
        return max(count - discounts[n], 0) / total + discounts[n] * followers[context] / total * lower

    return probability


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_bits_are_those_of_the_formula(order, seed):
    train, text = streams(seed)
    probability = kneser_ney(train.tolist(), order)
    expected = sum(
        -math.log2(probability(tuple(text[max(0, i - order + 1) : i].tolist()), int(text[i])))
        for i in range(1, len(text))
    )
    assert NGramModel(train, order, V).bits(text) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_probabilities_add_up_to_one(order):
    train, text = streams(2)
    model = NGramModel(train, order, V)
    before = text[:6]
    known = model.bits(before)
    total = sum(2.0 ** -(model.bits(np.append(before, np.int32(token))) - known) for token in range(V))
    assert total == pytest.approx(1, abs=1e-12)


def test_a_longer_context_helps_where_there_is_one_to_learn():
    train = np.tile(np.array([0, 1, 2, 0, 3, 2], np.int32), 50)
    bits = [NGramModel(train, order, V).bits(train[:60]) for order in (1, 2, 4)]
    assert bits[0] > 2 * bits[1] > 4 * bits[2]


@pytest.mark.parametrize(("order", "vocab_size"), [(0, 10), (6, 10), (2, 5000)])
def test_what_does_not_fit_into_an_integer_is_refused(order, vocab_size):
    with pytest.raises(ValueError, match=f"got order={order}, vocab_size={vocab_size}"):
        NGramModel(np.zeros(10, np.int32), order, vocab_size)
