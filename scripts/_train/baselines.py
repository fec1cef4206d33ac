"""What a language model has to beat: n-gram models of the same tokens."""

import numpy as np

# Bits of a token in the integer that stands for an n-gram; five fit into 63.
_BITS = 12


class NGramModel:
    """An interpolated Kneser-Ney model.

    P(w | h) = max(c(h w) - δ, 0) / c(h) + δ · d(h) / c(h) · P(w | h'), with d(h) the number of distinct tokens seen
    after h, and h' the context h without its first token; where h was never seen, P(w | h'). For n-grams of the full
    order c is the count in the training stream; for shorter ones it is the number of distinct tokens seen before them.
    The discount of an order is δ = n₁ / (n₁ + 2 n₂), with n_i the n-grams that have c = i, and ½ where n₁ is 0.
    Below the unigram stands 1 / vocab_size. Kneser and Ney 1995; Chen and Goodman 1999, section 2.7.

    Args:
        stream: int32, the training tokens.
        order: n, at most 5.
        vocab_size: tokens there are, at most 4096.
    """

    def __init__(self, stream: np.ndarray, order: int, vocab_size: int):
        if not 1 <= order <= 5 or vocab_size > 1 << _BITS:
            raise ValueError(f"n-grams of 1 to 5 tokens below {1 << _BITS}; got order={order}, vocab_size={vocab_size}")
        self.vocab_size = vocab_size
        grams, counts = np.unique(_grams(stream, order), return_counts=True)
        tables = [_Table(grams, counts)]
        for n in range(order - 1, 0, -1):
            # Every distinct longer n-gram is one more token before its last n.
            grams, counts = np.unique(grams & ((1 << n * _BITS) - 1), return_counts=True)
            tables.append(_Table(grams, counts))
        self._tables = tables[::-1]

    def bits(self, stream: np.ndarray) -> float:
        """Σ -log2 P of every token of a stream but the first; tokens near its start have a shorter context."""
        probability = np.full(len(stream) - 1, 1 / self.vocab_size)
        for n, table in enumerate(self._tables, start=1):
            # The n-grams that end at token n - 1 and later; before them the model of n - 1 tokens stands.
            start = max(n - 1, 1)
            lower = probability[start - 1 :]
            lower[:] = table.interpolate(_grams(stream, n)[start - (n - 1) :], lower)
        return float(-np.log2(probability).sum())


class _Table:
    """The n-grams of one order, sorted, with their counts and those of their contexts."""

    def __init__(self, grams: np.ndarray, counts: np.ndarray):
        self.grams, self.counts = grams, counts
        self.contexts, first, self.followers = np.unique(grams >> _BITS, return_index=True, return_counts=True)
        self.context_counts = np.add.reduceat(counts, first)
        once, twice = (int((counts == i).sum()) for i in (1, 2))
        self.discount = once / (once + 2 * twice) if once else 0.5

    def interpolate(self, grams: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """P of each n-gram's last token, given P by the order below."""
        count = _look_up(self.grams, self.counts, grams)
        context_count = _look_up(self.contexts, self.context_counts, grams >> _BITS)
        followers = _look_up(self.contexts, self.followers, grams >> _BITS)
        known = np.maximum(count - self.discount, 0) + self.discount * followers * lower
        return np.where(context_count > 0, known / np.maximum(context_count, 1), lower)


def _grams(stream: np.ndarray, n: int) -> np.ndarray:
    """int64 [len - n + 1], each run of n tokens as one number, the last token in the lowest bits."""
    grams = np.zeros(len(stream) - n + 1, np.int64)
    for i in range(n):
        grams = grams << _BITS | stream[i : len(stream) - n + 1 + i]
    return grams


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is not there; `keys` are sorted."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
