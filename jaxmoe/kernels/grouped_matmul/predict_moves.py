"""The predicted times of what stands around the products of a layer's experts, on a GPU: rows gathered, results added up.

Both only move bytes, so they take what the memory does; the constants are those of `predict`.
"""

from jaxmoe.hardware import GPU
from jaxmoe.kernels.grouped_matmul.predict import CACHE_KEPT, MEMORY_SHARE

# Seconds of starting a kernel of XLA's behind another, as of `predict.SUM_SECONDS`.
_LAUNCH_SECONDS = 2e-6


def gather_seconds(tokens: int, rows: int, width: int, itemsize: int, gpu: GPU) -> float:
    """Model the time of writing the rows of tokens once for each of their experts, by a kernel of its own.

    Args:
        tokens: tokens.
        rows: rows of all experts.
        width: numbers of a row.
        itemsize: bytes of a number.
        gpu: kind of GPU.

    >>> from jaxmoe.hardware import GPUS
    >>> round(gather_seconds(16384, 131072, 2048, 2, GPUS["h100"]) * 1e6)
    360
    """
    read = tokens if tokens * width * itemsize <= gpu.l2_cache * CACHE_KEPT else rows
    return _LAUNCH_SECONDS + (read + rows) * width * itemsize / (gpu.memory_bandwidth * MEMORY_SHARE)


def sum_seconds(tokens: int, rows: int, width: int, result_bytes: int, itemsize: int, gpu: GPU) -> float:
    """Model the time of the weighted sum of the results of each token's experts.

    Args:
        tokens: tokens.
        rows: rows of all experts.
        width: numbers of a row.
        result_bytes: bytes of a number of the experts' results.
        itemsize: bytes of a number of the sums.
        gpu: kind of GPU.
    """
    nbytes = width * (rows * result_bytes + tokens * itemsize)
    return _LAUNCH_SECONDS + nbytes / (gpu.memory_bandwidth * MEMORY_SHARE)
