"""Seconds of a GPU's kernels by CUPTI, the driver's own record of them: a host's clock sees its own calls besides."""

import importlib
from collections.abc import Callable
from typing import Any


def kernel_times(turn: Callable[[], Any]) -> list[tuple[str, float]]:
    """Give name and seconds of every kernel that a call starts, in order.

    `jax.experimental.mosaic.gpu.profiler.Cupti` does the same, but wants a function of its own to compile.

    Args:
        turn: function that returns when the device has done its work.

    Raises:
        RuntimeError: there is no CUPTI, or it saw no kernel.
    """
    try:
        profiler: Any = importlib.import_module("jax.experimental.mosaic.gpu.profiler")
        extension = profiler.mosaic_gpu_lib._mosaic_gpu_ext
        extension._cupti_init()
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"this jax has no CUPTI ({error})") from error
    try:
        turn()
    finally:
        timings = extension._cupti_get_timings(True)
    if not timings:
        raise RuntimeError("CUPTI saw no kernel")
    return [(name, milliseconds / 1e3) for name, milliseconds in timings]
