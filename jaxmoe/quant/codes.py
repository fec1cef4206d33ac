"""Codes of a few bits as numbers, by tables of values, and grids of scales. NumPy alone.

Tables whose entries are several float32 values turn a byte into all the numbers in it by one look-up, which is what makes
decoding fast: `np.take` moves entries of 8 and 16 bytes as fast as those of 4.
"""

from collections.abc import Callable
from functools import lru_cache

import ml_dtypes
import numpy as np

from jaxmoe.quant.base import Box, ceil_div
from jaxmoe.quant.errors import QuantizationError
from jaxmoe.quant.words import unpack_words

# Dtypes whose 256 codes are looked up: a cast of theirs takes five times as long.
_BYTE_FLOATS = frozenset(
    np.dtype(scalar) for scalar in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu)
)
# Codes that are looked up at a time: NumPy makes wider numbers of them, in memory that is not to be mapped for each.
_AT_ONCE = 1 << 13
# Rows that become columns at a time, so that what is computed of them stays in a core's cache.
_ROWS_AT_ONCE = 256
FLOAT4 = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
"""Values of OCP e2m1 by code: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and the same below zero."""


@lru_cache
def _byte_table(dtype: np.dtype) -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


@lru_cache
def _table(values: tuple[float, ...], bits: int, together: int, *, high_first: bool = False) -> np.ndarray:
    """For each way to put `together` codes side by side their values, as one number of as many bytes.

    Args:
        values: value of each code.
        bits: bits of a code.
        together: codes of an entry, 2 or 4.
        high_first: whether the code in the highest bits is the first; else that in the lowest is.
    """
    fields = np.arange(together)[:: -1 if high_first else 1] * bits
    codes = np.arange(2 ** (bits * together))[:, None] >> fields & (2**bits - 1)
    return np.array(values, np.float32)[codes].view(np.uint64 if together == 2 else np.complex128)[:, 0]


def to_float32(array: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Numbers of any stored type as float32, exactly; in `out`, contiguous and of the same shape, where it is given."""
    found = np.empty(array.shape, np.float32) if out is None else out
    if array.dtype in _BYTE_FLOATS:
        _look_up(_byte_table(array.dtype), array.view(np.uint8), found)
    else:
        np.copyto(found, array)
    return found


def not_zero(array: np.ndarray) -> np.ndarray:
    """Scales that may be zero, as float32 and with ones for zeros: what is left to be checked is that they are finite."""
    numbers = to_float32(array)
    return np.where(numbers == 0, np.float32(1), numbers)


def exponents_to_float32(array: np.ndarray) -> np.ndarray:
    """Scales as float32; bytes stand for powers of two, OCP's E8M0: 2^(b - 127), and 255 for NaN."""
    return to_float32(array.view(ml_dtypes.float8_e8m0fnu) if array.dtype == np.uint8 else array)


def nibbles_to_float32(
    packed: np.ndarray, values: np.ndarray, out: np.ndarray | None = None, *, high_first: bool = False
) -> np.ndarray:
    """Two codes a byte as float32 [..., 2·bytes].

    Args:
        packed: uint8 or int8 [..., bytes].
        values: value of each of 16 codes.
        out: contiguous float32 array that is used where it has the result's shape.
        high_first: whether the high half of a byte is the first number; else the low half is.
    """
    pairs = _table(tuple(values.tolist()), 4, 2, high_first=high_first)
    found = _result((*packed.shape[:-1], 2 * packed.shape[-1]), out)
    _look_up(pairs, packed.view(np.uint8), found)
    return found


def words_to_float32(
    words: np.ndarray, bits: int, out: np.ndarray | None = None, *, straddling: bool = True
) -> np.ndarray:
    """Codes of words, less half of their range, as float32 [..., as many as there are]; see `unpack_words`."""
    codes = unpack_words(words, bits, straddling=straddling)
    # As bytes with a sign, so that only the last step has four bytes for each.
    signed = np.subtract(codes, np.uint8(2 ** (bits - 1))).view(np.int8)
    return to_float32(signed, _result(codes.shape, out))


def codes_to_float32(
    codes: np.ndarray, bits: int, zeros: np.ndarray, box: Box, blocks: tuple[int, int], out: np.ndarray | None = None
) -> np.ndarray:
    """Codes less the zero points of their blocks, as float32; `box` and `blocks` as for `apply_grid`.

    Args:
        codes: uint8 [n, k]; of fewer than 8 bits they are overwritten.
        bits: bits of a code.
        zeros: uint8 [blocks of rows, blocks of columns].
        box: place of `codes` in the whole array.
        blocks: rows and columns of a block.
        out: contiguous float32 array that is used where it has the result's shape.
    """
    # Differences of fewer bits fit into bytes.
    differences = codes.astype(np.int16) if bits == 8 else codes.view(np.int8)
    apply_grid(np.subtract, differences, zeros.astype(differences.dtype), box, blocks)
    return to_float32(differences, _result(codes.shape, out))


def _result(shape: tuple[int, ...], out: np.ndarray | None) -> np.ndarray:
    return out if out is not None and out.shape == shape else np.empty(shape, np.float32)


def _look_up(table: np.ndarray, codes: np.ndarray, out: np.ndarray) -> None:
    """Put the entries of codes in `out`, contiguous float32 of one entry's numbers for each code."""
    flat, entries = np.ascontiguousarray(codes).reshape(-1), out.reshape(-1).view(table.dtype)
    for first in range(0, len(flat), _AT_ONCE):
        # With this mode and an output it writes there at once; no code is outside of the table.
        part = slice(first, first + _AT_ONCE)
        table.take(flat[part], out=entries[part], mode="clip")


def apply_grid(
    operation: Callable[..., np.ndarray], values: np.ndarray, grid: np.ndarray, box: Box, blocks: tuple[int, int]
) -> None:
    """Combine values with a grid that has one number for each block of them, in place.

    Args:
        operation: NumPy's `multiply` or `subtract`.
        values: float32 [..., n, k], what is in `box`.
        grid: float32 [..., blocks of rows, blocks of columns] that `box` touches; its leading dims may be 1.
        box: place of `values` in the whole array; it may start and end inside a block.
        blocks: rows and columns of a block.
    """
    (row, row_end), (column, column_end) = box[-2:]
    rows, columns = blocks
    if rows != 1:
        grid = np.take(grid, np.arange(row, row_end) // rows - row // rows, axis=-2)
    if grid.shape[-1] == 1 or columns == 1:
        operation(values, grid, out=values)
    elif column % columns == 0 and column_end % columns == 0:
        blocked = values.reshape(*values.shape[:-1], -1, columns)
        operation(blocked, grid[..., None], out=blocked)
        if not np.shares_memory(blocked, values):
            values[...] = blocked.reshape(values.shape)
    else:
        each = np.take(grid, np.arange(column, column_end) // columns - column // columns, axis=-1)
        operation(values, each, out=values)


def apply_groups(
    operation: Callable[..., np.ndarray], values: np.ndarray, grid: np.ndarray, groups: np.ndarray, size: int
) -> None:
    """Combine values [n, k] with a grid [n, groups] by the group of each column, in place.

    Args:
        operation: NumPy's `multiply` or `subtract`.
        values: float32 [n, k].
        grid: float32 [n, groups].
        groups: int [k], of each column, all of them there.
        size: columns of a group where groups follow one another; these need no look-up.
    """
    first = int(groups[0]) if len(groups) else 0
    last = first + ceil_div(len(groups), size)
    if np.array_equal(groups, first + np.arange(len(groups)) // size):
        box = ((0, values.shape[-2]), (0, len(groups)))
        apply_grid(operation, values, grid[..., first:last], box, (1, size))
    else:
        step, index = max(1, 4 * _AT_ONCE // max(len(groups), 1)), groups.astype(np.intp)
        taken = np.empty((step, len(groups)), np.float32)
        for row in range(0, values.shape[-2], step):
            rows = values[row : row + step]
            found = taken[: len(rows)]
            np.take(grid[row : row + step], index, axis=-1, out=found, mode="clip")
            operation(rows, found, out=rows)


def put_columns(out: np.ndarray, codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> None:
    """Put (codes - zeros) · scales of inputs that lie in rows into columns, some rows at a time.

    Args:
        out: float32 [..., k], whose leading dims are n together.
        codes: uint8 [k, n].
        zeros: uint8 [groups, n].
        scales: float32 [groups, n].
        groups: int [k], of each row, all of them there.
    """
    index, by_row, n = groups.astype(np.intp), np.moveaxis(out, -1, 0), codes.shape[-1]
    zeros, step = zeros.astype(np.int16), _ROWS_AT_ONCE
    # Memory for all steps: what is made anew for each would have to be mapped anew.
    integers, own = np.empty((2, step, n), np.int16)
    numbers, factors = np.empty((2, step, n), np.float32)
    # Rows that are not a power of two apart, so that those of a column do not fall on the same lines of a cache.
    apart = np.empty((step, n + 16), np.float32)[:, :n]
    for row in range(0, len(codes), step):
        # A group's row is gathered as a whole, where an entry for each column would be looked up.
        of = index[row : row + step]
        count = len(of)
        np.copyto(integers[:count], codes[row : row + count])
        zeros.take(of, axis=0, out=own[:count], mode="clip")
        scales.take(of, axis=0, out=factors[:count], mode="clip")
        np.subtract(integers, own, out=integers)
        np.copyto(numbers, integers)
        np.multiply(numbers, factors, out=apart)
        np.copyto(by_row[row : row + count], apart[:count].reshape(count, *out.shape[:-1]))


def check_groups(groups: np.ndarray, count: int, name: str) -> None:
    """Refuse groups of columns that are not there.

    Raises:
        QuantizationError: an entry is none of 0 to `count` - 1.
    """
    if len(groups) and not (groups.min() >= 0 and groups.max() < count):
        raise QuantizationError(f"{name} must name groups 0 to {count - 1}; it has {groups.min()} to {groups.max()}")
