"""Integers of a few bits that words hold side by side: unpacked, and turned from one order into another. NumPy alone."""

import math

import numpy as np

from jaxmoe.quant.base import ceil_div

_ROWS_AT_ONCE = 64


def unpack_words(words: np.ndarray, bits: int, *, straddling: bool = True) -> np.ndarray:
    """Codes of words, lowest bits first: uint8 [..., as many as there are].

    Args:
        words: int32 [..., words].
        bits: bits of a code, 1 to 8.
        straddling: whether a code may lie in two words; else each word holds 32 // bits codes and unused bits.
    """
    words = np.ascontiguousarray(words).view(np.uint32)
    lead, count = words.shape[:-1], words.shape[-1]
    if bits == 8:
        return words.view(np.uint8)
    if not straddling or 32 % bits == 0:
        fields = 32 // bits
        codes = np.empty((*words.shape, fields), np.uint8)
        for field in range(fields):
            codes[..., field] = (words >> np.uint32(bits * field)) & np.uint32(2**bits - 1)
        return codes.reshape(*lead, count * fields)
    groups = eights(words.view(np.uint8), bits)
    codes = np.empty((*groups.shape, 8), np.uint8)
    for field in range(8):
        codes[..., field] = (groups >> np.uint64(bits * field)) & np.uint64(2**bits - 1)
    return codes.reshape(*lead, -1)[..., : count * 32 // bits]


def columns_to_float32(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes that follow one another down the columns of words, lowest bits first: float32 [codes, n].

    Args:
        words: int32 [words, n], of as many rows as codes fill to the last bit.
        bits: bits of a code, 1 to 8; it may lie in two words.
    """
    together, n = bits // math.gcd(bits, 32), words.shape[-1]
    units = words.view(np.uint32).reshape(-1, together, n)
    numbers = np.empty((len(units), 32 * together // bits, n), np.float32)
    codes = np.empty((len(units), n), np.uint32)
    for field in range(numbers.shape[1]):
        word, shift = divmod(field * bits, 32)
        np.right_shift(units[:, word], np.uint32(shift), out=codes)
        if shift + bits > 32:
            codes |= units[:, word + 1] << np.uint32(32 - shift)
        codes &= np.uint32(2**bits - 1)
        # Numbers with a sign are cast by one instruction.
        numbers[:, field] = codes.view(np.int32)
    return numbers.reshape(-1, n)


def transpose_into(out: np.ndarray, values: np.ndarray) -> None:
    """Put values [k, n] into an array [n, k], some rows at a time: as many as a core's first cache has lines for."""
    for row in range(0, len(values), _ROWS_AT_ONCE):
        rows = slice(row, row + _ROWS_AT_ONCE)
        np.copyto(out[:, rows], values[rows].T)


def eights(stream: np.ndarray, bits: int) -> np.ndarray:
    """Bytes in which codes follow one another as numbers of eight codes each, uint64 [..., groups]."""
    groups = ceil_div(stream.shape[-1], bits)
    if stream.shape[-1] != groups * bits:
        padded = np.zeros((*stream.shape[:-1], groups * bits), np.uint8)
        padded[..., : stream.shape[-1]] = stream
        stream = padded
    found = np.zeros((*stream.shape[:-1], groups), np.uint64)
    for byte in range(bits):
        found |= stream[..., byte::bits].astype(np.uint64) << np.uint64(8 * byte)
    return found


def transpose_words(words: np.ndarray) -> np.ndarray:
    """Words [a, b] as [b, a], both steps of it along rows."""
    # Read as a part of a wide array whose rows are a power of two apart, they would fall on the same lines of a cache.
    return np.ascontiguousarray(np.ascontiguousarray(words).T)


def transpose_nibbles(words: np.ndarray) -> np.ndarray:
    """Swap which of eight words a code of four bits is in and which place it has there.

    Args:
        words: uint32 [8, ...].

    Returns:
        uint32 [8, ...]: place j of word i is what place i of word j was.
    """
    words = words.copy()
    for step, shift, mask in ((4, 16, 0x0000FFFF), (2, 8, 0x00FF00FF), (1, 4, 0x0F0F0F0F)):
        pairs = words.reshape(8 // (2 * step), 2, step, *words.shape[1:])
        first, second = pairs[:, 0], pairs[:, 1]
        differ = ((first >> np.uint32(shift)) ^ second) & np.uint32(mask)
        second ^= differ
        first ^= differ << np.uint32(shift)
    return words
