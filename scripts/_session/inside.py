"""The inside of every job: results, the time that is left, the device, and the sizes of a tiny session."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import simulate_devices
from scripts._bench.cases import SHAPES, Shape

TINY = bool(os.environ.get("SESSION_TINY"))
GPUS = int(os.environ.get("SESSION_GPUS", "1"))
if TINY and GPUS > 1:
    simulate_devices(GPUS)
TINY_SHAPE = Shape(4, 2, 64, 32)
Item = TypeVar("Item")


def emit(kind: str, **result: Any) -> None:
    """Print a result."""
    print(json.dumps({"kind": kind} | result, default=str), flush=True)


def seconds_left() -> float:
    """Seconds until the job should have ended by itself; the parent's clock is the same one."""
    return float(os.environ.get("SESSION_END", "inf")) - time.monotonic()


def while_time(items: Iterable[Item], *, reserve: float = 0.0) -> Iterator[Item]:
    """Items as long as there is time, more than each has taken so far; says how many are left out.

    Args:
        items: things to do, the most valuable first.
        reserve: seconds that the first one needs.
    """
    items, longest = list(items), reserve
    for number, item in enumerate(items):
        if seconds_left() < longest:
            print(json.dumps({"left_out": f"{len(items) - number} of {len(items)} for want of time"}), flush=True)
            return
        began = time.monotonic()
        yield item
        longest = max(longest, time.monotonic() - began)


def lose(kernel: str, why: str) -> None:
    """Say that later jobs are to do without a kernel."""
    print(json.dumps({"lost": kernel, "why": why}), flush=True)


def check_alive() -> None:
    """Refuse to go on in a process whose device no longer multiplies, for then all that follows would fail like that.

    Raises:
        ArithmeticError: a product of small integers is wrong.
        Exception: whatever jax raises where the device is lost.
    """
    numbers = np.arange(64 * 64, dtype=np.float32).reshape(64, 64) % 7
    if not np.array_equal(np.asarray(jnp.matmul(numbers, numbers, precision="highest")), numbers @ numbers):
        raise ArithmeticError("a product of small integers is wrong")


def device() -> jax.Device:
    """The device of the session."""
    return jax.devices()[0]


def shapes(*names: str) -> dict[str, Shape]:
    """Shapes by name; one tiny shape for all of them in a tiny session."""
    return {"tiny": TINY_SHAPE} if TINY else {name: SHAPES[name] for name in names}


def tokens(*counts: int) -> tuple[int, ...]:
    """Numbers of tokens; one small one in a tiny session."""
    return (16,) if TINY else counts
