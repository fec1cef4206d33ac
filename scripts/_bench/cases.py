"""What is computed: shapes of published models, the rows that each expert gets, and the least work they can take.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, K inner dimension and N output dimension of
a product; and R rows, here those of all experts of the shape.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Shape(NamedTuple):
    """The experts of one layer on one device.

    Attributes:
        experts: G.
        per_token: how many of them a token goes to.
        width: D.
        expert_width: F.
    """

    experts: int
    per_token: int
    width: int
    expert_width: int

    def scaled(self, divisor: int) -> "Shape":
        """The same with widths divided, still multiples of 8."""
        width, expert_width = (max(8, size // divisor // 8 * 8) for size in (self.width, self.expert_width))
        return self._replace(width=width, expert_width=expert_width)


# gpt-oss has biases and another activation: the products are the same.
SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b-a3b": Shape(128, 8, 2048, 768),
    "qwen3-235b": Shape(128, 8, 4096, 1536),
    # One of 8 devices: an eighth of the 256 experts, and of each token's 8 choices.
    "deepseek-v3-ep8": Shape(32, 1, 7168, 2048),
    "gpt-oss-20b": Shape(32, 4, 2880, 2880),
    "gpt-oss-120b": Shape(128, 4, 2880, 2880),
}
TOKENS = (1, 32, 128, 4096, 16384)


def parse_shape(text: str) -> tuple[str, Shape]:
    """A name in `SHAPES`, or "experts,per token,width,expert width".

    Raises:
        ValueError: neither.
    """
    if text in SHAPES:
        return text, SHAPES[text]
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(
            f"a shape is one of {', '.join(SHAPES)}, or four numbers: experts,per token,width,expert width; got {text!r}"
        )
    return text, Shape(*map(int, numbers))


# From the number of experts to how likely each is chosen.
ROUTINGS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "uniform": lambda experts, rng: np.ones(experts),
    "zipf": lambda experts, rng: rng.permutation(np.arange(1, experts + 1) ** -1.2),
    "one": lambda experts, rng: rng.permutation(np.arange(experts) == 0).astype(float),
    "half": lambda experts, rng: rng.permutation(np.arange(experts) < (experts + 1) // 2).astype(float),
}


def draw_group_sizes(routing: str, shape: Shape, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of each expert, int32 [G], tokens x per_token in all.

    A token goes to different experts where enough of them are ever chosen, as with "uniform", "zipf" and most of "half".
    """
    likely_G = ROUTINGS[routing](shape.experts, rng)
    if np.count_nonzero(likely_G) < shape.per_token:
        sizes_G = rng.multinomial(tokens * shape.per_token, likely_G / likely_G.sum())
    else:
        # The largest of log p + Gumbel noise are draws without replacement (Vieira, 2014).
        with np.errstate(divide="ignore"):
            keys_TG = np.log(likely_G) + rng.gumbel(size=(tokens, shape.experts))
        chosen_TK = np.argpartition(-keys_TG, shape.per_token - 1)[:, : shape.per_token]
        sizes_G = np.bincount(chosen_TK.reshape(-1), minlength=shape.experts)
    return sizes_G.astype(np.int32)


# "up": gate and up in one product; "down"; "mlp": both with the activation between them.
OPERATIONS = ("up", "down", "mlp")


class Case(NamedTuple):
    """One line of the benchmark: an operation on the rows of so many tokens."""

    name: str
    shape: Shape
    operation: str
    tokens: int
    routing: str
    dtype: str

    @property
    def rows(self) -> int:
        """R."""
        return self.tokens * self.shape.per_token

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """[N, K] of each product."""
        D, F = self.shape.width, self.shape.expert_width
        return {"up": [(2 * F, D)], "down": [(D, F)], "mlp": [(2 * F, D), (D, F)]}[self.operation]

    @property
    def row_widths(self) -> tuple[int, int]:
        """Numbers of a row that goes in, and of one that comes out."""
        return self.matrices[0][1], self.matrices[-1][0]


class Floor(NamedTuple):
    """The least that a case can take: every operation done, every byte moved once.

    Attributes:
        flops: of the products, 2·R·N·K each.
        nbytes: of the matrices of the experts that have rows, of the rows that go in and of those that come out.
    """

    flops: float
    nbytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The larger of the times that operations and bytes take."""
        return max(self.flops / flops_per_second, self.nbytes / bytes_per_second)


def floor_of(case: Case, touched: float, itemsize: int) -> Floor:
    """The floor of a case in which so many experts have rows."""
    weights = sum(N * K for N, K in case.matrices)
    return Floor(2.0 * case.rows * weights, float(itemsize) * (touched * weights + case.rows * sum(case.row_widths)))
