"""Differences between values and what they decode to, summed tile by tile."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass
class ErrorSum:
    """Differences of one weight, or of several.

    Attributes:
        squares: sum of the squares of differences.
        of_values: sum of the squares of values.
        difference: largest difference.
        value: largest absolute value.
    """

    squares: float = 0.0
    of_values: float = 0.0
    difference: float = 0.0
    value: float = 0.0

    def add(self, values: np.ndarray, decoded: np.ndarray) -> None:
        """Add the differences of a tile.

        Args:
            values: float32 array.
            decoded: float32 array of its shape, which is written to.
        """
        if not values.size:
            return
        np.subtract(decoded, values, out=decoded)
        self.squares += float(np.square(decoded, dtype=np.float64).sum())
        self.of_values += float(np.square(values, dtype=np.float64).sum())
        self.difference = max(self.difference, float(decoded.max()), -float(decoded.min()))
        self.value = max(self.value, float(values.max()), -float(values.min()))

    @property
    def rms(self) -> float:
        """Root of the mean square of differences, relative to that of values; 0 where all values are."""
        return math.sqrt(self.squares / (self.of_values or 1.0))

    @property
    def max(self) -> float:
        """Largest difference, relative to the largest value; 0 where all values are."""
        return self.difference / (self.value or 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """Differences that quantizing made among the weights of one kind in one layer.

    Attributes:
        layer: index of the layer.
        kind: "attention", "routed experts", "shared experts" or "dense MLP".
        weights: number of them.
        rms: root of the mean square of the differences, relative to that of the values.
        max: largest difference in a weight, relative to the largest value in it; of all weights the largest.
    """

    layer: int
    kind: str
    weights: int
    rms: float
    max: float
