"""Seconds of a turn: by the GPU's own clock, where CUPTI or CUDA events give it, else by the wall's, and it says which."""

import statistics
import time
from typing import NamedTuple

import jax

from jaxmoe.kernels.grouped_matmul.gpu_clock import kernel_times
from scripts._bench.inputs import VARIANTS
from scripts._bench.sides import Turn

ROUNDS = 5


class Timed(NamedTuple):
    """Seconds of one call, of which a turn makes `VARIANTS`.

    Attributes:
        seconds: by the best clock there is.
        wall_seconds: by the wall's.
        clock: name of the best clock.
        by_kernel: names of the GPU's kernels with their seconds, longest first; empty without CUPTI.
    """

    seconds: float
    wall_seconds: float
    clock: str
    by_kernel: list[tuple[str, float]]


def measure(
    turn: Turn, device: jax.Device, *, calls: int = VARIANTS, torch: bool = False, rounds: int = ROUNDS
) -> Timed:
    """Time a turn that has been called before.

    Args:
        turn: calls, and a wait for their end.
        device: device that they run on.
        calls: number of calls in a turn.
        torch: flag that they are torch's.
        rounds: turns, of which the median counts.
    """
    wall = statistics.median(_wall(turn) for _ in range(rounds)) / calls
    if device.platform != "gpu":
        return Timed(wall, wall, "the wall's clock, on a CPU", [])
    try:
        if torch:
            return Timed(statistics.median(_events(turn) for _ in range(rounds)) / calls, wall, "CUDA events", [])
        measured = sorted((kernel_times(turn) for _ in range(rounds)), key=lambda kernels: sum(s for _, s in kernels))
    except RuntimeError as error:
        return Timed(wall, wall, f"the wall's clock over {calls} calls ({error})", [])
    kernels = measured[len(measured) // 2]
    by_name: dict[str, float] = {}
    for name, seconds in kernels:
        by_name[name] = by_name.get(name, 0.0) + seconds / calls
    return Timed(sum(by_name.values()), wall, "CUPTI", sorted(by_name.items(), key=lambda item: -item[1]))


def _wall(turn: Turn) -> float:
    start = time.perf_counter()
    turn()
    return time.perf_counter() - start


def _events(turn: Turn) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    turn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
