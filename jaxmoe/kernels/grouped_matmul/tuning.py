"""The fastest tiles of a kernel on the GPU at hand: a dozen candidates by a model of their cost, each compared with float64.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import dataclasses
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.hardware import GPU, GPUS, get_gpu
from jaxmoe.kernels.grouped_matmul.backends import GPU_BACKENDS
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from jaxmoe.kernels.grouped_matmul.gpu_clock import kernel_times
from jaxmoe.kernels.grouped_matmul.predict import Product, predict
from jaxmoe.kernels.grouped_matmul.row_loops import take_rows
from jaxmoe.kernels.grouped_matmul.tile_table import row_class
from jaxmoe.kernels.grouped_matmul.trial_oracle import exact
from jaxmoe.kernels.grouped_matmul.work import TOLERANCES, MatrixKind, Work

MOST_CANDIDATES, THREADS, ROUNDS = 12, 8, 5
# Calls of one turn, each with rows and group sizes of its own.
CALLS = 4
# Groups whose results are compared with float64, the largest among them, and rows of each.
SAMPLED_GROUPS, SAMPLED_ROWS = 4, 64
# Tiles with an error of more than this many times that of the kernel's own choice are wrong, not fast.
ERROR_ALLOWED = 2.0
# Tiles that take more than this part of what the kernel's own choice takes are not worth an entry.
WORTH = 0.98
# A layer takes the sums of the second product as they are, for it adds them up over experts.
DOWN_DTYPE = jnp.dtype(jnp.float32)

# Makes all calls of a turn, waits for them and returns the first one's result.
Turn = Callable[[], jax.Array]
# From a turn to the seconds of it.
Clock = Callable[[Turn], float]

# From a kernel's module, rows, matrices [G, halves·N, K], halves and kind of device to the tiles that may be good for them.
CANDIDATES: dict[str, Callable[[Any, Any, Any, int, str], Sequence[Any]]] = {
    "mosaic_gpu": lambda kernel, rows, matrices, halves, device_kind: kernel.candidate_tiles(
        dataclasses.replace(
            kernel.problem_of(rows, matrices, halves, rows.dtype if halves == 2 else DOWN_DTYPE, device_kind),
            gathered=halves == 2,
        )
    ),
    "triton": lambda kernel, rows, matrices, halves, device_kind: kernel.candidate_tiles(
        rows.shape[0], matrices.shape[0], matrices.shape[2], matrices.shape[1], rows.dtype.itemsize
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningCase:
    """A product of a layer's experts on one device.

    Attributes:
        name: name for people.
        groups: experts G of the device.
        rows: rows R of all of them.
        width: D.
        expert_width: F, of the part of it that the device has.
        gate_up: flag that it is the first product, gate and up with the activation; else it is the one with down.
        per_token: experts of a token. The first product gathers tokens' rows by an index, as in a layer.
        dtype: dtype of rows and matrices.
    """

    name: str
    groups: int
    rows: int
    width: int
    expert_width: int
    gate_up: bool
    per_token: int = 1
    dtype: str = "bfloat16"

    @property
    def halves(self) -> int:
        """2 for gate and up, else 1."""
        return 2 if self.gate_up else 1

    @property
    def matrix(self) -> tuple[int, int]:
        """[N, K], of gate and up together."""
        D, F = self.width, self.expert_width
        return (2 * F, D) if self.gate_up else (D, F)

    @property
    def work(self) -> Work:
        """The work that is compared with float64: the whole MLP for gate and up."""
        D, F = self.width, self.expert_width
        down = MatrixKind((D, F), self.dtype)
        if not self.gate_up:
            return Work(self.dtype, (down,))
        return Work(self.dtype, (MatrixKind((2, F, D), self.dtype), down), activation="silu")

    def __str__(self) -> str:
        return f"{self.name}, {'gate and up' if self.gate_up else 'down'}, {self.rows} rows by {self.groups} experts"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The result of tuning one case.

    Attributes:
        default_seconds: seconds of a call with the kernel's own choice.
        seconds: seconds of a call with each candidate that is right, fastest first.
        refused: reason for each of the others.
    """

    default_seconds: float
    seconds: dict[Any, float]
    refused: dict[Any, str]

    def best(self) -> Any | None:
        """Give the fastest tiles, if they are worth an entry."""
        fastest = next(iter(self.seconds), None)
        return fastest if fastest and self.seconds[fastest] < WORTH * self.default_seconds else None


def tune(
    kernel: str,
    case: TuningCase,
    device: jax.Device,
    *,
    clock: Clock | None = None,
    rounds: int = ROUNDS,
    most: int = MOST_CANDIDATES,
) -> Tuned:
    """Time the candidates of a kernel that a model of cost has as the best, and its own choice, in turns.

    Args:
        kernel: name in `CANDIDATES`.
        case: product.
        device: device that it runs on.
        clock: function that times a turn; by default `gpu_seconds`.
        rounds: turns of each, of which the median counts.
        most: candidates.

    Raises:
        ArithmeticError: the kernel is wrong with its own choice of tiles.
        NotImplementedError: it does not do such products.
    """
    module = importlib.import_module(GPU_BACKENDS[kernel].module)
    stacks = _draw_stacks(case)
    inputs = [_draw_rows(case, stacks, seed) for seed in range(CALLS)]
    matrices = stacks[0].reshape(case.groups, *case.matrix)
    places = jax.eval_shape(take_rows, *inputs[0][:2])
    every = CANDIDATES[kernel](module, places, matrices, case.halves, device.device_kind)
    candidates = cheapest(every, case, known_gpu(device.device_kind), most=most)
    compile_with = _compiler(module, case, stacks, inputs, device)
    sample = _Sample.of(case, inputs[0], stacks)
    turns = {None: compile_with(None)}
    default_error = sample.error(turns[None]())
    allowed = min(TOLERANCES[case.dtype], ERROR_ALLOWED * default_error)
    if not default_error <= TOLERANCES[case.dtype]:
        raise ArithmeticError(
            f"{kernel} is wrong with its own choice of tiles: a row is off by {default_error:.2g} of its norm"
        )
    refused = {}
    with ThreadPoolExecutor(THREADS) as pool:
        compiling = {tiles: pool.submit(compile_with, tiles) for tiles in candidates}
    for tiles, compiled in compiling.items():
        try:
            turn = compiled.result()
            error = sample.error(turn())
        except Exception as refusal:  # too much shared memory, registers, ...: compilers say so in many ways
            refused[tiles] = f"{type(refusal).__name__}: {(str(refusal).splitlines() or [''])[0]}"
            continue
        if error <= allowed:
            turns[tiles] = turn
        else:
            refused[tiles] = f"wrong: a row is off by {error:.2g} of its norm, where {allowed:.2g} is allowed"
    times: dict[Any, list[float]] = {tiles: [] for tiles in turns}
    for _ in range(rounds):
        for tiles, turn in turns.items():
            times[tiles].append((clock or gpu_seconds)(turn) / CALLS)
    seconds = {tiles: statistics.median(taken) for tiles, taken in times.items()}
    default_seconds = seconds.pop(None)
    return Tuned(default_seconds, dict(sorted(seconds.items(), key=lambda item: item[1])), refused)


def entry_of(kernel: str, case: TuningCase, tuned: Tuned) -> dict[str, Any]:
    """Make the line of the tile table for what was found; `tuned.best()` is not None."""
    best: Any = tuned.best()
    N, K = case.matrix
    return {
        "kernel": f"{kernel}.gate_up" if case.gate_up else kernel,
        "dtype": case.dtype,
        "out_dtype": case.dtype if case.gate_up else DOWN_DTYPE.name,
        "K": K,
        "N": N,
        "row_class": row_class(case.rows / case.groups),
        "tiles": dataclasses.asdict(best),
        "rows": case.rows,
        "groups": case.groups,
        "seconds": tuned.seconds[best],
        "default_seconds": tuned.default_seconds,
        "jax": jax.__version__,
    }


def cases_of(
    name: str,
    *,
    experts: int,
    per_token: int,
    width: int,
    expert_width: int,
    tokens: Iterable[int],
    dtype: str = "bfloat16",
) -> list[TuningCase]:
    """List both products for numbers of tokens; of several in one class of rows a group, the largest stands for it."""
    rows = {row_class(T * per_token / experts): T * per_token for T in sorted(tokens)}
    return [
        TuningCase(
            name=name,
            groups=experts,
            rows=R,
            width=width,
            expert_width=expert_width,
            gate_up=gate_up,
            per_token=per_token,
            dtype=dtype,
        )
        for R in rows.values()
        for gate_up in (True, False)
    ]


def gpu_seconds(turn: Turn) -> float:
    """Time a turn by CUPTI; by the host's clock where there is none."""
    try:
        return sum(seconds for _, seconds in kernel_times(turn))
    except RuntimeError:
        start = time.perf_counter()
        turn()
        return time.perf_counter() - start


def known_gpu(device_kind: str) -> GPU:
    """Find the kind of GPU in `jaxmoe.hardware`; an H100 where it is not known."""
    try:
        return get_gpu(device_kind)
    except ValueError:
        return GPUS["h100"]


def cheapest(candidates: Sequence[Any], case: TuningCase, gpu: GPU, *, most: int = MOST_CANDIDATES) -> list[Any]:
    """Choose the candidates that `cost` has as the fastest, the kernel's own choice, which is first, among them.

    Args:
        candidates: tiles with m, n, k, stages and band.
        case: product that they are for; rows are spread evenly.
        gpu: kind of GPU.
        most: number of candidates.
    """
    first, *others = candidates
    if len(others) < most:
        return list(candidates)
    return [first, *sorted(others, key=lambda tiles: cost(tiles, case, gpu))[: most - 1]]


def cost(tiles: Any, case: TuningCase, gpu: GPU) -> tuple[float, float]:
    """The predicted seconds of the product that tiles are for, and those on the chip, which memory may hide.

    Those of Triton's tiles are as if the Hopper kernel had them.
    """
    N, K = case.matrix
    even, more = divmod(case.rows, case.groups)
    product = Product(
        sizes=(even + 1,) * more + (even,) * (case.groups - more),
        halves=case.halves,
        N=N // case.halves,
        K=K,
        row_bytes=jnp.dtype(case.dtype).itemsize,
        out_bytes=jnp.dtype(case.dtype if case.gate_up else DOWN_DTYPE).itemsize,
        weight_bits=8 * jnp.dtype(case.dtype).itemsize,
    )
    if not hasattr(tiles, "swapped"):
        # Triton's n counts gate and up together, Mosaic GPU's each of them.
        sizes = {name: getattr(tiles, name) for name in ("m", "k", "stages", "band")}
        tiles = SimpleNamespace(**sizes, n=max(1, tiles.n // product.halves), swapped=False, splits=1, cluster=1)
    found = predict(product, tiles, gpu)
    return found.seconds, found.on_chip


# --- arrays and programs

# Rows, those of tokens [T, D] with the index [R] of each place's, or [R, K] with None; group sizes [G], and these on the
# host.
Rows = tuple[jax.Array, jax.Array | None, jax.Array, np.ndarray]


def _draw_stacks(case: TuningCase) -> list[jax.Array]:
    def draw(seed: int, kind: MatrixKind) -> jax.Array:
        bound = (3 / kind.shape[-1]) ** 0.5
        shape = (case.groups, *kind.shape)
        make = jax.jit(lambda: jax.random.uniform(jax.random.key(seed), shape, case.dtype, -bound, bound))
        return make()

    return [draw(seed, kind) for seed, kind in enumerate(case.work.matrices)]


def _draw_rows(case: TuningCase, stacks: Sequence[jax.Array], seed: int) -> Rows:
    rng = np.random.default_rng([seed, case.rows])
    sizes = rng.multinomial(case.rows, [1 / case.groups] * case.groups)
    places = rng.permutation(case.rows) // case.per_token
    index, count = (jnp.asarray(places, jnp.int32), int(places.max()) + 1) if case.gate_up else (None, case.rows)
    rows = jax.random.normal(jax.random.key(seed), (count, stacks[0].shape[-1]), case.dtype)
    return rows, index, jnp.asarray(sizes, jnp.int32), sizes


def _compiler(
    module: Any, case: TuningCase, stacks: Sequence[jax.Array], inputs: Sequence[Rows], device: jax.Device
) -> Callable[[Any], Turn]:
    """Give the function from tiles, or None for the kernel's own choice, to a compiled turn of `CALLS` calls."""
    flat = [stack.reshape(case.groups, -1, stack.shape[-1]) for stack in stacks]

    def call(
        tiles: Any, rows: jax.Array, index: jax.Array | None, sizes: jax.Array, matrices: Sequence[jax.Array]
    ) -> jax.Array:
        if not case.gate_up:
            return module.grouped_matmul(
                rows, matrices[0], sizes, out_dtype=DOWN_DTYPE, device_kind=device.device_kind, tiles=tiles
            )
        return module.expert_mlp(
            rows,
            *matrices,
            sizes,
            index_R=index,
            b_up_pN=None,
            b_down_pD=None,
            combine=combine_halves("silu", None, gated=True),
            out_dtype=rows.dtype,
            device_kind=device.device_kind,
            tiles=(tiles, None),
        )

    def compile_with(tiles: Any) -> Turn:
        def chain(inputs: Sequence[tuple[Any, ...]], matrices: Sequence[jax.Array]) -> list[jax.Array]:
            outs: list[jax.Array] = []
            for rows, index, sizes in inputs:
                if outs:  # one after the other
                    rows, outs[-1] = jax.lax.optimization_barrier((rows, outs[-1]))
                outs.append(call(tiles, rows, index, sizes, matrices))
            return outs

        given = [arrays for *arrays, _ in inputs]
        compiled = jax.jit(chain).lower(given, flat).compile()
        return lambda: jax.block_until_ready(compiled(given, flat))[0]

    return compile_with


@dataclasses.dataclass(frozen=True)
class _Sample:
    """Some rows of the first call's result, and what they should be in float64."""

    rows: np.ndarray
    exact: np.ndarray

    @classmethod
    def of(cls, case: TuningCase, first: Rows, stacks: Sequence[jax.Array]) -> "_Sample":
        rows, index, _, sizes = first
        starts, filled = np.cumsum(sizes) - sizes, np.flatnonzero(sizes)
        spread = filled[np.linspace(0, len(filled) - 1, SAMPLED_GROUPS - 1).astype(int)]
        chosen = np.unique([*spread, np.argmax(sizes)])
        own = [
            starts[group] + np.unique(np.linspace(0, sizes[group] - 1, min(sizes[group], SAMPLED_ROWS)).astype(int))
            for group in chosen
        ]
        places = np.concatenate(own)
        own_stacks: list[Any] = [stack[chosen] for stack in stacks]
        biases: list[jax.Array | None] = [None] * len(stacks)
        own_rows = rows[places if index is None else index[places]]
        return cls(places, exact(case.work, own_rows, own_stacks, biases, np.asarray([*map(len, own)]), None))

    def error(self, result: jax.Array) -> float:
        """Give the largest ‖actual − exact‖ / ‖exact‖ of a row; infinite where a number of the result is not finite."""
        actual = np.asarray(result[self.rows].astype(jnp.float32), np.float64)
        error = np.max(np.linalg.norm(actual - self.exact, axis=1) / np.linalg.norm(self.exact, axis=1))
        return float(error) if np.isfinite(error) else math.inf
