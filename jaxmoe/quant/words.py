"""Integers of a few bits that words hold side by side: unpacked, and turned from one order into another. NumPy alone."""

import math

import numpy as np

from jaxmoe.quant.base import ceil_div


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
    if bits in (2, 4):
        bytes_ = words.view(np.uint8)
        return _spread(bytes_.astype(np.uint16 if bits == 4 else np.uint32), bits).view(np.uint8)
    if not straddling or 32 % bits == 0:
        fields = 32 // bits
        codes = np.empty((*words.shape, fields), np.uint8)
        for field in range(fields):
            codes[..., field] = (words >> np.uint32(bits * field)) & np.uint32(2**bits - 1)
        return codes.reshape(*lead, count * fields)
    return _spread(_eights(words.view(np.uint8), bits), bits).view(np.uint8)[..., : count * 32 // bits]


def _spread(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Codes side by side in the lowest bits of numbers, moved apart until each has a byte of its own, in place.

    The upper half of the codes moves away from the lower, then the upper half of each half, for all of a number at once.
    """
    count, of = numbers.dtype.itemsize, numbers.dtype.type
    while count > 1:
        half = count // 2
        upper = sum(
            (2 ** (bits * half) - 1) << (8 * first + bits * half) for first in range(0, numbers.dtype.itemsize, count)
        )
        moved = numbers & of(upper)
        numbers ^= moved
        moved <<= of((8 - bits) * half)
        numbers |= moved
        count = half
    return numbers


def unpack_columns(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes that follow one another down the columns of words, lowest bits first: uint8 [codes, n].

    Args:
        words: int32 [words, n], of as many rows as codes fill to the last bit.
        bits: bits of a code, 1 to 8; it may lie in two words.
    """
    together, n = bits // math.gcd(bits, 32), words.shape[-1]
    units = np.ascontiguousarray(words).view(np.uint32).reshape(-1, together, n)
    codes = np.empty((len(units), 32 * together // bits, n), np.uint8)
    shifted = np.empty((len(units), n), np.uint32)
    for field in range(codes.shape[1]):
        word, shift = divmod(field * bits, 32)
        np.right_shift(units[:, word], np.uint32(shift), out=shifted)
        if shift + bits > 32:
            shifted |= units[:, word + 1] << np.uint32(32 - shift)
        np.copyto(codes[:, field], shifted, casting="unsafe")
    codes &= np.uint8(2**bits - 1)
    return codes.reshape(-1, n)


def _eights(stream: np.ndarray, bits: int) -> np.ndarray:
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
