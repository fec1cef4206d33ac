"""The config of embeddings of n-grams, and the numbers that they are looked up by."""

import dataclasses
import functools
import math

from jaxmoe.checks import check_positive

_MOST_ROWS = 2**31 - 1  # of a table, whose rows are counted in int32
_MOST_SIZE = 2**28  # of a head: remainders are taken four bits at a time, in 32
_BITS = 2**64 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NGramConfig:
    """Embeddings of the last tokens together, which a layer adds to its residual streams; Qwen4-Exp has them.

    Each n-gram, of two tokens up to `ngram_size`, is hashed by several heads, each into rows of its own of one table.

    Attributes:
        ngram_size: tokens of the longest n-gram.
        heads: number of heads for each length of n-grams.
        width: width of the embeddings of all heads together.
        vocab_size: number of tokens that the hash was made for.
        least_rows: least number of rows of a head.
        rows_multiple: number that the rows of all heads together are padded to a multiple of.
        seed: seed of the hash.
        place: number of layers before this one that have such embeddings.
        end_token: token that no n-gram goes beyond; it stands before the start of a sequence.
        conv_kernel_size: number of taps of the convolution, `ngram_size` positions apart.
        parts: number of tensors that a checkpoint may have the table in.
    """

    ngram_size: int
    heads: int
    width: int
    vocab_size: int
    least_rows: int
    rows_multiple: int
    seed: int
    place: int
    end_token: int
    conv_kernel_size: int
    parts: int

    def __post_init__(self) -> None:
        check_positive(self, "heads", "width", "vocab_size", "least_rows", "rows_multiple", "conv_kernel_size", "parts")
        if self.ngram_size < 2:
            raise ValueError(f"an n-gram has two tokens or more; got ngram_size={self.ngram_size}")
        if self.width % self.all_heads:
            raise ValueError(
                f"embeddings are split evenly over {self.all_heads} heads (heads_per_ngram for each length of n-grams); got "
                f"a width of {self.width} (ple_embed_dim)"
            )
        if self.least_rows * self.all_heads * (self.place + 2) > _MOST_ROWS or self.least_rows > _MOST_SIZE // 2:
            raise ValueError(
                f"a table of n-grams has less than 2^31 rows, and a head less than 2^28; got {self.least_rows} rows or more "
                f"for each of {self.all_heads} heads (ngram_vocab_size_base)"
            )

    @property
    def all_heads(self) -> int:
        """Number of heads of all lengths."""
        return (self.ngram_size - 1) * self.heads

    @property
    def head_rows(self) -> tuple[int, ...]:
        """Rows of each head, all of them different primes, those of shorter n-grams first."""
        return _primes(self.least_rows, (self.place + 1) * self.all_heads)[self.place * self.all_heads :]

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return math.ceil(sum(self.head_rows) / self.rows_multiple) * self.rows_multiple

    @property
    def multipliers(self) -> tuple[int, ...]:
        """Odd numbers of 63 bits that tokens are multiplied by, the last token's first: no product has more than those."""
        bound = max(1, (2**63 - 1) // self.vocab_size // 2)
        start = self.seed + 10007 * self.place
        return tuple(2 * (_mixed(start + 0x9E3779B97F4A7C15 * (i + 1)) % bound) + 1 for i in range(self.ngram_size))


def _mixed(value: int) -> int:
    """SplitMix64 (Steele et al. 2014, figure 14)."""
    value = (value + 0x9E3779B97F4A7C15) & _BITS
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _BITS
    return value ^ (value >> 31)


@functools.cache
def _primes(least: int, count: int) -> tuple[int, ...]:
    """The first `count` primes from `least` on."""
    found: list[int] = []
    value = max(least, 2)
    while len(found) < count:
        if all(value % divisor for divisor in range(2, math.isqrt(value) + 1)):
            found.append(value)
        value += 1
    return tuple(found)
