"""Host memory that JAX takes without a copy, and host memory that is used again and again."""

import math
from collections.abc import Sequence

import numpy as np

_ALIGNMENT = 64  # what the CPU backend asks of memory that a jax.Array is to alias


def aligned_array(shape: Sequence[int], dtype: np.dtype, *, zeros: bool = False) -> np.ndarray:
    """A new row-major array at a multiple of 64 bytes, with any content or all zeros.

    ``jax.device_put`` of it to a CPU device aliases it. Pages are not touched here: the thread that first writes to
    one also pays for it, so that this cost is shared by the reading threads.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    raw = (np.zeros if zeros else np.empty)(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


class Scratch:
    """Memory of one thread that holds one array at a time and grows to the largest."""

    def __init__(self) -> None:
        self._memory = aligned_array((0,), np.dtype(np.uint8))

    def array(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array in this memory, with any content; the one before it is overwritten."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > self._memory.size:
            self._memory = aligned_array((nbytes,), np.dtype(np.uint8))
        return self._memory[:nbytes].view(dtype).reshape(shape)
