"""Finding the fastest tiles for one case."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from scripts._bench.cases import Case
from scripts._bench.inputs import VARIANTS, Variant, exact_sample, to_float64
from scripts._bench.report import check_error, reason
from scripts._bench.sides import Turn, jax_turn
from scripts._bench.timing import take_turns

# Tiles whose result is worse than this many times that of the kernel's own choice are wrong, not fast.
ERROR_ALLOWED = 2.0

# From tiles, or None for the kernel's own choice, to a function of rows, matrices and group sizes.
WithTiles = Callable[[Any], Callable[..., jax.Array]]


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What was found for one case.

    Attributes:
        default_seconds: of a call with the kernel's own choice.
        seconds: of a call with each candidate that works, fastest first.
        refused: why the others do not.
    """

    default_seconds: float
    seconds: dict[Any, float]
    refused: dict[Any, str]

    def best(self, *, worth: float = 0.98) -> Any | None:
        """The fastest tiles, if they take less than `worth` of what the kernel's own choice takes."""
        fastest = next(iter(self.seconds), None)
        return fastest if fastest and self.seconds[fastest] < worth * self.default_seconds else None


def tune(
    with_tiles: WithTiles,
    candidates: Sequence[Any],
    case: Case,
    variants: Sequence[Variant],
    *,
    rounds: int = 7,
    budget_s: float = 2.0,
    threads: int = 1,
) -> Tuned:
    """Time every candidate of a kernel, and its own choice, in turns.

    Args:
        with_tiles: the kernel.
        candidates: tiles; some may not compile.
        case: what the function does to its rows and to the matrices of the case's operation.
        variants: the calls of a turn.
        rounds: turns of each.
        budget_s: as for `timing.take_turns`.
        threads: candidates that are compiled at once.

    Raises:
        ArithmeticError: the kernel is wrong with its own choice of tiles.
        Exception: whatever else it raises with it.
    """
    sample = exact_sample(case, variants[0])
    default = _compile(with_tiles(None), case, variants)
    default_error = sample.error(to_float64(default(), sample.rows))
    turns, refused = {None: default}, {}
    check_error(default_error, case.dtype)
    with ThreadPoolExecutor(threads) as pool:
        compiling = {tiles: pool.submit(_compile, with_tiles(tiles), case, variants) for tiles in candidates}
    for tiles, compiled in compiling.items():
        try:
            turn = compiled.result()
            error = sample.error(to_float64(turn(), sample.rows))
            check_error(error, case.dtype)
        except Exception as refusal:  # too much shared memory, registers, ...: compilers say so in many ways
            refused[tiles] = reason(refusal)
            continue
        if error <= ERROR_ALLOWED * default_error:
            turns[tiles] = turn
        else:
            refused[tiles] = f"relative error {error:.1e}, where the kernel's own tiles have {default_error:.1e}"
    taken = take_turns(turns, rounds=rounds, budget_s=budget_s)
    seconds = {tiles: statistics.median(times) / VARIANTS for tiles, times in taken.items()}
    default_seconds = seconds.pop(None)
    return Tuned(default_seconds, dict(sorted(seconds.items(), key=lambda item: item[1])), refused)


def _compile(function: Callable[..., jax.Array], case: Case, variants: Sequence[Variant]) -> Turn:
    inputs = [(v.rows, *v.layer.matrices(case.operation), v.group_sizes) for v in variants]
    (device,) = variants[0].rows.devices()
    return jax_turn(function, inputs, device)
