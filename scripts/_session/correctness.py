"""Whether kernels are right: at real sizes on every row of some groups, and in every variant at small ones.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import islice, starmap

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.kernels.grouped_matmul import expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.trial import FEW, MANY, WIDE, Rows, try_work
from jaxmoe.kernels.grouped_matmul.work import TOLERANCES, MatrixKind, Outcome, Work
from scripts._bench.cases import Case
from scripts._bench.inputs import Variant, exact_sample, make_layers, make_variants
from scripts._bench.report import reason
from scripts._session.inside import TINY, check_alive, device, emit, lose, shapes, tokens, while_time

REPEATS = 4 if TINY else 50
# Rows after those of the last group; they hold NaN.
UNOWNED = 8
# Groups and rows as in the tests of kernels: empty groups, less than a tile and more, no multiples of 8.
SIZES = (([5, 0, 130, 1], 141), ([0, 0, 0], 24), ([1, 1, 1, 1], 4), ([0, 9, 0, 23], 32))
FP8_BLOCK = 32 if TINY else 128
# [halves, N, K] and [N, K] of packed matrices.
PACKED_UP, PACKED_DOWN = ((2, 32, 64), (64, 32)) if TINY else ((2, 256, 512), (512, 256))


def first_light(kernel: str) -> None:
    """Emit verdicts on Qwen3-30B-A3B's experts: all rows of four groups against float64, and bits that repeat."""
    for name, shape in shapes("qwen3-30b-a3b").items():
        layers = make_layers(shape, "bfloat16", device())
        for T, operation in while_time([(T, op) for T in tokens(32, 4096) for op in ("mlp", "down")]):
            case = Case(name, shape, operation, T, "uniform", "bfloat16")
            outcome = _tried(
                lambda case=case, layers=layers: hold_against_float64(case, make_variants(case, layers)[0], kernel)
            )
            emit("check", case=f"{name}, {operation}, {T} tokens", **dataclasses.asdict(outcome))
            if outcome.verdict != "right":
                lose(kernel, f"{outcome.verdict} at {name}'s sizes")


def hold_against_float64(case: Case, variant: Variant, kernel: str, *, repeats: int = REPEATS) -> Outcome:
    """Compare all rows of four groups with float64, rows of no group with zeros, and repeats with the first call.

    Args:
        case: operation on its rows.
        variant: arrays of it.
        kernel: name of the backend.
        repeats: calls that have to give the same bits.
    """
    R = case.rows
    rows = jnp.concatenate([variant.rows, jnp.full((UNOWNED, variant.rows.shape[1]), jnp.nan, variant.rows.dtype)])
    call = jax.jit(_operation(case.operation, kernel))
    results = call(rows, variant.group_sizes, *variant.layer.matrices(case.operation))
    first = np.asarray(results.astype(jnp.float32)).astype(np.float64)
    sample = exact_sample(case, variant, most_rows=R)
    if np.any(first[R:]):
        return Outcome("wrong", "a row that no group owns is not zeros")
    if not np.all(np.isfinite(first)):
        return Outcome("wrong", "a result is not finite")
    off = np.linalg.norm(first[sample.rows] - sample.exact, axis=1) / np.linalg.norm(sample.exact, axis=1)
    if np.max(off) > TOLERANCES[case.dtype]:
        worst = int(sample.rows[np.argmax(off)])
        wrong = int(np.sum(off > TOLERANCES[case.dtype]))
        return Outcome("wrong", f"{wrong} of {len(off)} rows; row {worst} is off by {np.max(off):.2g} of its norm")
    others = sum(
        not bool(jnp.array_equal(call(rows, variant.group_sizes, *variant.layer.matrices(case.operation)), results))
        for _ in range(repeats - 1)
    )
    if others:
        return Outcome("wrong", f"{others} of {repeats} calls gave other bits than the first")
    return Outcome(
        "right", f"{len(off)} rows are off by {np.max(off):.1g} of their norm at most, {repeats} calls alike"
    )


def _operation(operation: str, kernel: str) -> Callable[..., jax.Array]:
    def down(rows: jax.Array, sizes: jax.Array, matrices: jax.Array) -> jax.Array:
        return grouped_matmul(
            rows, matrices, sizes, out_dtype="float32", backend=kernel, device_kind=device().device_kind
        )

    def mlp(rows: jax.Array, sizes: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
        gate_up = up.reshape(up.shape[0], 2, -1, up.shape[2])
        return expert_mlp(rows, gate_up, down, sizes, backend=kernel, device_kind=device().device_kind)

    return mlp if operation == "mlp" else down


def plain_variants(kernel: str) -> None:
    """Emit verdicts on plain matrices: dtypes, activations, biases, tails, and the tests' group sizes."""
    _try_all(kernel, plain_works())


def packed_variants(kernel: str) -> None:
    """Emit verdicts on packed matrices of every format, with rows as they are and rounded."""
    _try_all(kernel, packed_works())


def _try_all(kernel: str, works: Iterator[tuple[str, Work]]) -> None:
    for name, work in while_time(islice(works, 2 if TINY else None)):
        cases = (FEW, *starmap(Rows, SIZES), MANY) if "tests" in name else (FEW, MANY, WIDE)
        outcome = _tried(
            lambda work=work, cases=cases: try_work(
                work, kernel, device_kind=device().device_kind, repeats=4, cases=cases
            )
        )
        emit("check", case=name, **dataclasses.asdict(outcome))


def _tried(trial: Callable[[], Outcome]) -> Outcome:
    try:
        return trial()
    except NotImplementedError as refusal:
        return Outcome("refused", str(refusal))
    except Exception as error:  # compilers and devices fail in many ways; the next variant may do
        check_alive()
        return Outcome("crashed", reason(error))


def plain_works() -> Iterator[tuple[str, Work]]:
    """Name and work of each variant of plain matrices, the most wanted first."""

    def mlp(
        dtype: str, F: int, D: int, activation: str, *, limit: float | None = None, halves: int = 2, biases: bool
    ) -> Work:
        kinds = MatrixKind((halves, F, D), dtype), MatrixKind((D, F), dtype)
        return Work(dtype, kinds, biases=biases, activation=activation, limit=limit)

    def product(dtype: str, N: int, K: int) -> Work:
        return Work(dtype, (MatrixKind((N, K), dtype),))

    F, D = (32, 64) if TINY else (256, 512)
    yield "group sizes of the tests", product("bfloat16", F, D)
    yield "silu", mlp("bfloat16", F, D, "silu", biases=False)
    yield "clamped_swiglu, biases", mlp("bfloat16", F, D, "clamped_swiglu", limit=1.5, biases=True)
    yield "group sizes of the tests, silu, biases", mlp("bfloat16", F, D, "silu", biases=True)
    yield "gradient, silu", mlp("bfloat16", F, D, "silu", biases=False).of_gradient
    gradient = mlp("bfloat16", F, D, "clamped_swiglu", limit=1.5, biases=True).of_gradient
    yield "gradient, group sizes of the tests, clamped_swiglu, biases", gradient
    yield "gradient, tails, [2880, 1440]", product("bfloat16", 2880, 1440).of_gradient
    for N, K in ((24, 64), (136, 80), (200, 48), (2880, 2880)):
        yield f"tails, [{N}, {K}]", product("bfloat16", N, K)
    yield "float16", product("float16", F, D)
    yield "float32", product("float32", F, D)
    yield "float16, silu, biases", mlp("float16", F, D, "silu", biases=True)
    for activation, limit, halves in (
        ("relu2", None, 1),
        ("gelu", None, 2),
        ("limited_swiglu", 1.5, 2),
        ("capped_swiglu", 1.5, 2),
        ("gelu_tanh", None, 2),
    ):
        yield (
            f"{activation}, {halves} halves",
            mlp("bfloat16", F, D, activation, limit=limit, halves=halves, biases=False),
        )


def packed_works() -> Iterator[tuple[str, Work]]:
    """Name and work of each packed format, the most wanted first."""

    def mlp(
        form: str,
        block: tuple[int, int | None],
        scales: str,
        activations: str = "none",
        *,
        zero_points: bool = False,
        matrix_scales: bool = False,
    ) -> Work:
        kinds = [
            MatrixKind(
                shape,
                form,
                (block[0], block[1] or shape[-1]),
                scales,
                zero_points,
                shape[:-2] if matrix_scales else None,
            )
            for shape in (PACKED_UP, PACKED_DOWN)
        ]
        return Work("bfloat16", tuple(kinds), activation="silu", activations=activations)

    square, whole_rows = (FP8_BLOCK, FP8_BLOCK), (1, None)
    mxfp4 = mlp("mxfp4", (1, 32), "uint8")
    yield "fp8 in blocks", mlp("float8_e4m3fn", square, "float32")
    yield "fp8 in blocks, rows in fp8", mlp("float8_e4m3fn", square, "float32", "fp8_block")
    yield "mxfp4, biases, clamped", dataclasses.replace(mxfp4, biases=True, activation="clamped_swiglu", limit=7.0)
    yield "int4, zero points", mlp("int4", (1, 32), "bfloat16", zero_points=True)
    yield "nvfp4", mlp("nvfp4", (1, 16), "float8_e4m3fn", matrix_scales=True)
    yield "fp8 by rows, rows in fp8", mlp("float8_e4m3fn", whole_rows, "float32", "fp8_token")
    yield "fp8, static rows", mlp("float8_e4m3fn", square, "float32", "fp8_static")
    yield "int8 by rows", mlp("int8", whole_rows, "bfloat16")
    yield "int8 by rows, rows in int8", mlp("int8", whole_rows, "float32", "int8_token")
    yield "int4", mlp("int4", (1, 32), "bfloat16")
