"""A trial of a backend: small numbers of rows at real widths, compared with float64, and repeated bit for bit.

`verdicts` runs it as a program, for a kernel may crash a process or never come back:

    python -m jaxmoe.kernels.grouped_matmul.trial BACKEND < work.jsonl

It prints a line of JSON for every line of work that it reads, as soon as it has come to a verdict.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.kernels.grouped_matmul.api import expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.backends import load_backend
from jaxmoe.kernels.grouped_matmul.quantized import Matrices, as_matrices
from jaxmoe.kernels.grouped_matmul.quantized_rows import ROW_FORMATS
from jaxmoe.kernels.grouped_matmul.row_loops import take_rows
from jaxmoe.kernels.grouped_matmul.trial_oracle import exact, exact_gradients
from jaxmoe.kernels.grouped_matmul.work import TOLERANCES, Outcome, Work


class Rows(NamedTuple):
    """Rows of a case.

    Attributes:
        sizes: different rows of each group.
        total: rows in all; the last belong to no group, and hold NaN.
        copies: times that each row stands there, one after the other, so that many have few results to be computed exactly.
    """

    sizes: Sequence[int]
    total: int
    copies: int = 1

    @property
    def owned(self) -> int:
        """Rows that belong to groups."""
        return sum(self.sizes) * self.copies


FEW, MANY = Rows((1, 0, 2), 8), Rows((130, 0, 71), 256)
# Rows enough for the widest tiles of a kernel, those that clusters of blocks share, and for more of them than a GPU has at a
# time. Tiles are chosen by the rows that there are, so a gradient, whose exact one wants few, has those tiles too.
WIDE, WIDE_GRADIENT = Rows((36, 0, 27), 2048, copies=31), Rows((130, 0, 71), 2048)
REPEATS = 20
# Numbers that are rounded to 8 bits may go to either neighbor where they are nearly halfway between two.
ROUNDED_TOLERANCE = 2.0**-3
# Allowed |actual − exact| of one number, relative to the largest of its row.
LARGEST_TOLERANCE = 2.0**-2


def try_work(
    work: Work,
    backend: str,
    *,
    device_kind: str | None = None,
    repeats: int = REPEATS,
    cases: Sequence[Rows] = (FEW, MANY),
) -> Outcome:
    """Hold a backend's products, or the gradients of its own, against float64, on the device that jax takes by default.

    Args:
        work: products or gradients to try.
        backend: name in `BACKENDS` or `GPU_BACKENDS`.
        device_kind: kind of the device, by which tiles are chosen.
        repeats: calls of each case, but for the first of several, whose results have to be the same bits.
        cases: rows, for each case; of gradients without copies.
    """
    worst = 0.0
    for number, of_case in enumerate(cases, 1):
        calls = 1 if number == 1 < len(cases) else repeats
        rng = np.random.default_rng(of_case.total)
        stacks = [kind.random(rng, len(of_case.sizes)) for kind in work.matrices]
        biases = [_biases(rng, work, stack) if work.biases else None for stack in stacks]
        drawn = rng.standard_normal((-(-of_case.total // of_case.copies), stacks[0].shape[-1]), np.float32)
        rows = jnp.asarray(np.repeat(drawn, of_case.copies, axis=0)[: of_case.total], work.rows)
        rows = rows.at[of_case.owned :].set(jnp.nan)
        if missing := work.gradient and _missing_gradient(backend, rows, stacks, device_kind):
            return Outcome("refused", missing)
        make_cases = _gradients if work.gradient else _results
        try:
            for case, call, expected in make_cases(work, backend, device_kind, rng, rows, stacks, biases, of_case):
                first = jax.tree.leaves(call())
                found = _compare(first, expected, _tolerance(work))
                if isinstance(found, str):
                    return Outcome("wrong", f"{case}: {found}")
                worst = max(worst, found)
                same = [all(map(jnp.array_equal, first, jax.tree.leaves(call()))) for _ in range(calls - 1)]
                if not all(same):
                    return Outcome(
                        "wrong", f"{case}: {same.count(False)} of {calls} calls gave other bits than the first"
                    )
        except NotImplementedError as refusal:
            return Outcome("refused", str(refusal))
    parts = "gradients" if work.gradient else "rows"
    return Outcome(
        "right", f"{parts} are off by {worst:.1g} of their norm at most, and {repeats} calls gave the same bits"
    )


# A case in words, a call of it, and its results in float64: arrays whose first dim is rows that are owned, or groups.
Case = tuple[str, Callable[[], Any], list[np.ndarray]]


def _results(
    work: Work,
    backend: str,
    device_kind: str | None,
    rng: np.random.Generator,
    rows: jax.Array,
    stacks: list[Matrices],
    biases: list[jax.Array | None],
    of_case: Rows,
) -> Iterator[Case]:
    scales, sizes = _input_scales(work, len(of_case.sizes)), np.asarray(of_case.sizes)
    owned, copies = of_case.owned, of_case.copies
    # A layer gives the rows of an MLP by an index, in any order and some several times.
    any_of = rng.integers(0, max(sizes.sum(), 1), sizes.sum()) * copies
    index = np.append(np.repeat(any_of, copies) + rng.integers(0, copies, owned), np.arange(owned, len(rows)))
    for out_dtype, gathered in dict.fromkeys([(work.rows, False), ("float32", work.activation is not None)]):
        index_R = jnp.asarray(index, jnp.int32) if gathered else None
        call = jax.jit(partial(_multiply, work, backend, device_kind, out_dtype=out_dtype))
        arguments = rows, stacks, biases, jnp.asarray(sizes * copies, jnp.int32), scales, index_R
        different = take_rows(rows, index_R)[:owned:copies]
        expected = np.repeat(exact(work, different, stacks, biases, sizes, scales), copies, axis=0)
        how = " by an index" if gathered else ""
        yield f"{len(rows)} rows{how}, result in {out_dtype}", partial(call, *arguments), [expected]


def _gradients(
    work: Work,
    backend: str,
    device_kind: str | None,
    rng: np.random.Generator,
    rows: jax.Array,
    stacks: list[Any],
    biases: list[jax.Array | None],
    of_case: Rows,
) -> Iterator[Case]:
    assert of_case.copies == 1
    sizes, owned = of_case.sizes, of_case.owned
    dy = jnp.asarray(rng.standard_normal((len(rows), stacks[-1].shape[-2]), np.float32))
    expected = exact_gradients(work, rows[:owned], stacks, biases, np.asarray(sizes), dy[:owned])

    @jax.jit
    def call(rows: jax.Array, stacks: Any, biases: Any, sizes: jax.Array, dy: jax.Array) -> Any:
        def multiply(rows: jax.Array, stacks: Any, biases: Any) -> jax.Array:
            return _multiply(work, backend, device_kind, rows, stacks, biases, sizes, None, None, out_dtype="float32")

        return jax.vjp(multiply, rows, stacks, biases)[1](dy)

    arguments = rows, stacks, biases, jnp.asarray(sizes, jnp.int32), dy.at[owned:].set(jnp.nan)
    yield f"gradient of {len(rows)} rows", partial(call, *arguments), expected


def _compare(results: list[jax.Array], expected: list[np.ndarray], tolerance: float) -> str | float:
    """The fault of some results, or how far they are off at most."""
    worst = 0.0
    for result, exact_result in zip(results, expected, strict=True):
        actual, right = (
            array.reshape(len(array), math.prod(array.shape[1:]))  # there may be no rows
            for array in (np.asarray(result.astype(jnp.float32)), exact_result)
        )
        owned = np.flatnonzero(np.any(right, axis=1))
        if np.any(np.delete(actual, owned, axis=0)):
            return "a row that no group owns, or a group without rows, is not zeros"
        if not len(owned):
            continue
        actual, right = actual[owned], right[owned]
        if not np.all(np.isfinite(actual)):
            return "a result is not finite"
        difference = np.abs(actual - right)
        of_rows = np.max(np.linalg.norm(difference, axis=1) / np.linalg.norm(right, axis=1))
        of_numbers = np.max(np.max(difference, axis=1) / np.max(np.abs(right), axis=1))
        if of_rows > tolerance or of_numbers > LARGEST_TOLERANCE:
            return (
                f"a row is off by {of_rows:.2g} of its norm, a number by {of_numbers:.2g} of the largest in its row, where "
                f"{tolerance:.2g} and {LARGEST_TOLERANCE:.2g} are allowed"
            )
        worst = max(worst, float(of_rows))
    return worst


def _missing_gradient(backend: str, rows: jax.Array, stacks: list[Matrices], device_kind: str | None) -> str:
    """The reason why a backend's gradient is not its own; empty where it is."""
    why: Callable[..., str] | None = getattr(load_backend(backend), "missing_gradient", None)
    return why(rows, *map(as_matrices, stacks), device_kind=device_kind) if why else ""


def _multiply(
    work: Work,
    backend: str,
    device_kind: str | None,
    rows: jax.Array,
    stacks: list[Matrices],
    biases: list[jax.Array | None],
    sizes: jax.Array,
    scales: jax.Array | None,
    index: jax.Array | None,
    *,
    out_dtype: str,
) -> jax.Array:
    if work.activation is None:
        return grouped_matmul(
            rows,
            stacks[0],
            sizes,
            activations=work.activations,
            input_scales_G=scales,
            out_dtype=out_dtype,
            backend=backend,
            device_kind=device_kind,
        )
    w_gate_up, w_down = stacks
    return expert_mlp(
        rows,
        w_gate_up,
        w_down,
        sizes,
        index_R=index,
        b_gate_up_p2F=biases[0],
        b_down_pD=biases[1],
        activation=work.activation,
        limit=work.limit,
        activations=work.activations,
        input_scales_p2=scales,
        out_dtype=out_dtype,
        backend=backend,
        device_kind=device_kind,
    )


def _biases(rng: np.random.Generator, work: Work, stack: Matrices) -> jax.Array:
    return jnp.asarray(rng.standard_normal(stack.shape[:-1], np.float32) / 4, work.rows)


def _input_scales(work: Work, groups: int) -> jax.Array | None:
    form = ROW_FORMATS[work.activations]
    if form is None or not form.static:
        return None
    return jnp.full((groups, 2) if work.activation else (groups,), 4 / form.largest, jnp.float32)


def _tolerance(work: Work) -> float:
    return TOLERANCES[work.rows] if work.activations == "none" else ROUNDED_TOLERANCE


def main() -> None:
    """Read lines of work, print a verdict on each."""
    backend, device = sys.argv[1], jax.devices()[0]
    for line in sys.stdin:
        try:
            work = Work.from_json(line)
            # A gradient takes float64 of whole stacks, so it is tried once.
            cases = (WIDE_GRADIENT,) if work.gradient else (FEW, MANY, WIDE)
            outcome = try_work(work, backend, device_kind=device.device_kind, cases=cases)
        except Exception as error:
            short_of_memory = "RESOURCE_EXHAUSTED" in str(error)
            first_line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            outcome = Outcome("untested" if short_of_memory else "crashed", first_line)
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
