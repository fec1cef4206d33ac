"""Timing in turns: every side has one turn a round, so that ratios hold where a machine's speed drifts."""

import time
from collections.abc import Callable, Mapping
from typing import Any

# After each turn, for the threads of that side to go to sleep.
PAUSE_S = 0.02


def take_turns(
    sides: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, list[float]]:
    """Time every side once a round. They have been called before: what is compiled then is not timed.

    Args:
        sides: name to a function that returns when the work is done.
        rounds: turns of a side.
        budget_s: a side that has worked for so long has no more turns; each has one at least.
        clock: seconds.
        pause: what waits between turns.

    Returns:
        Seconds of each turn of each side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, work in sides.items():
            if sum(seconds[name]) > budget_s:
                continue
            start = clock()
            work()
            seconds[name].append(clock() - start)
            pause(PAUSE_S)
    return seconds
