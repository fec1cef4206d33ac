"""What the machine can do at all: a dense product for arithmetic, a copy for memory."""

import importlib.util
import statistics
from typing import NamedTuple

import jax
import jax.numpy as jnp

from scripts._bench.sides import Turn, jax_turn
from scripts._bench.timing import take_turns


class Ceilings(NamedTuple):
    """Rates, measured: the best of XLA's and, where it is installed for this device, torch's."""

    flops_per_second: float
    bytes_per_second: float


def measure_ceilings(dtype: str, device: jax.Device, *, rounds: int = 5, quick: bool = False) -> Ceilings:
    """Of a [n, n] product with another, and of a large array read and written.

    Args:
        dtype: of both.
        device: where.
        rounds: turns of each.
        quick: small ones, for a test run.
    """
    n = 256 if quick else 1024 if device.platform == "cpu" else 8192
    elements = (2**22 if quick else 2**28 if device.platform == "cpu" else 2**31) // jnp.dtype(dtype).itemsize
    square = jax.random.uniform(jax.random.key(0), (n, n), dtype)
    line = jnp.ones(elements, dtype)
    # Not a copy in so many words, which XLA might leave to others: each number is read, changed and written.
    turns = {
        "dense": jax_turn(jnp.matmul, [(square, square)], device),
        "copy": jax_turn(jnp.negative, [(line,)], device),
        **_torch_turns(square, line, device),
    }
    for turn in turns.values():
        turn()
    seconds = {name: statistics.median(all_) for name, all_ in take_turns(turns, rounds=rounds, budget_s=5).items()}
    dense = min(taken for name, taken in seconds.items() if name.startswith("dense"))
    copy = min(taken for name, taken in seconds.items() if name.startswith("copy"))
    return Ceilings(2 * n**3 / dense, 2 * line.nbytes / copy)


def _torch_turns(square: jax.Array, line: jax.Array, device: jax.Device) -> dict[str, Turn]:
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if device.platform == "gpu" and not torch.cuda.is_available():
        return {}
    matrix, numbers = torch.from_dlpack(square), torch.from_dlpack(line)
    out = torch.empty_like(numbers)

    def synchronised(work: Turn) -> None:
        work()
        if matrix.is_cuda:
            torch.cuda.synchronize()

    return {
        "dense, torch": lambda: synchronised(lambda: matrix @ matrix),
        "copy, torch": lambda: synchronised(lambda: out.copy_(numbers)),
    }
