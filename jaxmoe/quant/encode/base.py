"""The contract of an encoder: from plain values to the arrays of a format, a tile at a time."""

import abc
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from jaxmoe.quant.base import Arrays, QuantFormat, Shape, ceil_div, whole
from jaxmoe.quant.encode.errors import ErrorSum
from jaxmoe.quant.errors import QuantizationError

# Elements that are encoded at a time: few enough for a core's cache, where a block's rows are not longer.
_TILE = 1 << 18


class Encoder(abc.ABC):
    """A way to make the arrays of a format from values, so that decoding them gives the nearest that the format has.

    An encoder is a frozen dataclass, as formats are. It takes matrices [..., N, K], outputs first: whole ones, or any box
    of them whose edges are edges of blocks (or of the matrices).

    A subclass says `format`, `dtypes` and `tile`, and what config.json says of such weights; a new one is a file, and a
    line in `jaxmoe.quant.encode.TARGETS`.

    Attributes:
        rows: outputs that share a scale.
        stacks: whether tensors with all experts of a layer are encoded, as against one for each.
        kinds: kinds of weights that are encoded where nothing else is said.
    """

    rows: ClassVar[int] = 1
    stacks: ClassVar[bool] = False
    kinds: ClassVar[frozenset[str]] = frozenset({"attention", "routed experts", "shared experts", "dense MLP"})

    @property
    @abc.abstractmethod
    def format(self) -> QuantFormat:
        """The format of what is made."""

    @abc.abstractmethod
    def dtypes(self, dtype: np.dtype) -> dict[str, np.dtype]:
        """The dtype of each array, by its role in the format, for values of a dtype."""

    @abc.abstractmethod
    def tile(self, values: np.ndarray, scale_dtype: np.dtype) -> dict[str, np.ndarray]:
        """The arrays of one matrix by role, its scales in that dtype.

        Args:
            values: finite float32 [n, K], whole blocks but for those at the edges of the matrix.
            scale_dtype: dtype of scales, of those that `dtypes` names.
        """

    @abc.abstractmethod
    def settings(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The block ``quantization_config`` of a config.json.

        Args:
            ignored: names of the linear modules that are plain.
        """

    def static_settings(self, ignored: Sequence[str]) -> dict[str, Any] | None:
        """The same for weights with static fp8 scales of their inputs besides; None where readers take no such scales."""
        return None

    def extras(self, shape: Shape) -> dict[str, np.ndarray]:
        """Tensors that files have beside the arrays, by role, for matrices of a shape."""
        return {}

    def check_shape(self, shape: Shape) -> str | None:
        """The reason why matrices [..., N, K] of this shape cannot be encoded; None if they can."""
        return self.format.check_shape(shape)

    def encode(self, values: np.ndarray, error: ErrorSum | None = None) -> dict[str, np.ndarray]:
        """Encode matrices, or a box of them.

        Args:
            values: values [..., N, K] of any floating dtype.
            error: sum that gets the differences between these and what they decode to.

        Returns:
            Arrays by role, of the format's usual shapes.

        Raises:
            QuantizationError: the shape is none that the format holds, or a value is not finite.

        >>> from jaxmoe.quant.encode import TARGETS
        >>> arrays = TARGETS["int4_group"].encode(np.ones((2, 64), np.float32))
        >>> {role: (array.dtype.name, array.shape) for role, array in arrays.items()}
        {'values': ('int32', (2, 8)), 'scale': ('float32', (2, 2))}
        """
        problem = self.check_shape(values.shape)
        if problem is not None:
            raise QuantizationError(problem)
        dtypes = self.dtypes(values.dtype)
        shapes = {role: self.format.shapes(role, values.shape)[0] for role in dtypes}
        arrays = {role: np.empty(shapes[role], dtype) for role, dtype in dtypes.items()}
        for lead, start, stop in _tiles(values.shape, self.rows):
            numbers = np.ascontiguousarray(values[lead][start:stop], np.float32)
            if not np.isfinite(numbers).all():
                raise QuantizationError("values must be finite to be quantized; there is NaN or infinity among them")
            found = self.tile(numbers, dtypes["scale"])
            for role, array in found.items():
                # A grid has one row for each block of rows, all other arrays one for each.
                block = 1 if shapes[role][len(lead)] == values.shape[-2] else self.rows
                arrays[role][lead][start // block : ceil_div(stop, block)] = array
            if error is not None:
                error.add(numbers, self.decode(found, numbers.shape))
        return arrays

    def decode(self, arrays: Arrays, shape: Shape) -> np.ndarray:
        """The values of what `encode` made of matrices of a shape, float32."""
        decoded = np.empty(shape, np.float32)
        self.format.decode(arrays, whole(shape), shape, {role: one.shape for role, one in arrays.items()}, decoded)
        return decoded


def largest(values: np.ndarray, axis: int) -> np.ndarray:
    """The largest absolute value along an axis, which is kept."""
    return np.maximum(values.max(axis, keepdims=True), -values.min(axis, keepdims=True))


def _tiles(shape: Shape, rows: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """(place in the leading dims, first row, row after the last) of tiles, each of whole blocks of so many rows."""
    *lead, N, K = shape
    step = max(_TILE // max(K, 1) // rows, 1) * rows
    for place in np.ndindex(*lead) if math.prod(shape) else ():
        for start in range(0, N, step):
            yield place, start, min(start + step, N)
