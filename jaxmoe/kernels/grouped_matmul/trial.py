"""A trial of a backend: small numbers of rows at real widths, compared with float64, and repeated bit for bit.

`verdicts` runs it as a program, for a kernel may crash a process or never come back:

    python -m jaxmoe.kernels.grouped_matmul.trial BACKEND < work.jsonl

It prints a line of JSON for every line of work that it reads, as soon as it has come to a verdict.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.kernels.grouped_matmul.api import expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from jaxmoe.kernels.grouped_matmul.quantized import Matrices, QuantizedStack, dequantize
from jaxmoe.kernels.grouped_matmul.quantized_rows import ROW_FORMATS, groups_of_rows, quantize_rows
from jaxmoe.kernels.grouped_matmul.work import TOLERANCES, Outcome, Work

# Rows of each group, and rows in all: the last belong to no group, and hold NaN.
FEW, MANY = ((1, 0, 2), 8), ((130, 0, 71), 256)
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
    groups: Sequence[tuple[Sequence[int], int]] = (FEW, MANY),
) -> Outcome:
    """Hold a backend's products against float64, on the device that jax takes by default.

    Args:
        work: products to try.
        backend: name in `BACKENDS` or `GPU_BACKENDS`.
        device_kind: kind of the device, by which tiles are chosen.
        repeats: calls of the last case whose results have to be the same bits.
        groups: cases, each the rows of its groups and rows in all.
    """
    multiply = partial(_multiply, work, backend, device_kind)
    worst = 0.0
    for number, (sizes, R) in enumerate(groups, 1):
        calls = repeats if number == len(groups) else 1
        rng = np.random.default_rng(R)
        stacks = [kind.random(rng, len(sizes)) for kind in work.matrices]
        biases = [_biases(rng, work, stack) if work.biases else None for stack in stacks]
        scales = _input_scales(work, len(sizes))
        rows = jnp.asarray(rng.standard_normal((R, stacks[0].shape[-1]), np.float32), work.rows)
        owned = sum(sizes)
        rows = rows.at[owned:].set(jnp.nan)
        expected = exact(work, rows[:owned], stacks, biases, np.asarray(sizes), scales)
        for out_dtype in dict.fromkeys((work.rows, "float32")):
            try:
                call = jax.jit(partial(multiply, out_dtype=out_dtype))
                results = [call(rows, stacks, biases, jnp.asarray(sizes, jnp.int32), scales) for _ in range(calls)]
                first = np.asarray(results[0].astype(jnp.float32))
            except NotImplementedError as refusal:
                return Outcome("refused", str(refusal))
            case = f"{R} rows, result in {out_dtype}"
            if np.any(first[owned:]):
                return Outcome("wrong", f"{case}: a row that no group owns is not zeros")
            if not np.all(np.isfinite(first[:owned])):
                return Outcome("wrong", f"{case}: a result is not finite")
            difference = np.abs(first[:owned] - expected)
            if not owned:
                continue
            of_rows = np.linalg.norm(difference, axis=1) / np.linalg.norm(expected, axis=1)
            of_numbers = np.max(difference, axis=1) / np.max(np.abs(expected), axis=1)
            if np.max(of_rows) > _tolerance(work) or np.max(of_numbers) > LARGEST_TOLERANCE:
                return Outcome(
                    "wrong",
                    f"{case}: a row is off by {np.max(of_rows):.2g} of its norm, a number by {np.max(of_numbers):.2g} of "
                    f"the largest in its row, where {_tolerance(work):.2g} and {LARGEST_TOLERANCE:.2g} are allowed",
                )
            same = [bool(jnp.all(result == results[0])) for result in results]
            if not all(same):
                return Outcome("wrong", f"{case}: {same.count(False)} of {calls} calls gave other bits than the first")
            worst = max(worst, float(np.max(of_rows)))
    return Outcome(
        "right", f"rows are off by {worst:.1g} of their norm at most, and {repeats} calls gave the same bits"
    )


def exact(
    work: Work,
    rows: jax.Array,
    stacks: list[Matrices],
    biases: list[jax.Array | None],
    sizes: np.ndarray,
    scales: jax.Array | None,
) -> np.ndarray:
    """Compute the result in float64, on the host; rows that are rounded first are rounded here too.

    Args:
        work: products.
        rows: [R, K], each of a group.
        stacks: matrices of the products, a stack each.
        biases: biases of the products, None where there are none.
        sizes: rows of each group.
        scales: scales of static activations, as `expert_mlp` or `grouped_matmul` takes them.
    """
    groups = np.repeat(np.arange(len(sizes)), sizes)
    x = np.asarray(rows.astype(jnp.float32)).astype(np.float64)
    for number, (stack, bias) in enumerate(zip(stacks, biases, strict=True)):
        own_scales = scales if scales is None or scales.ndim == 1 else scales[:, number]
        x = _rounded(x, work, sizes, own_scales)
        out = np.concatenate([x[groups == group] @ _float64(stack, group).T for group in range(len(sizes))])
        if bias is not None:
            out += np.asarray(bias.astype(jnp.float32)).reshape(len(sizes), -1)[groups]
        if number == 0 and work.activation is not None:
            combine = combine_halves(work.activation, work.limit, gated=work.matrices[0].shape[0] == 2)
            # h is rounded to the rows' dtype, which matters where that decides between two numbers of 8 bits.
            out = np.asarray(combine(jnp.asarray(out, jnp.float32)).astype(work.rows).astype(jnp.float32), np.float64)
        x = out
    return x


def _multiply(
    work: Work,
    backend: str,
    device_kind: str | None,
    rows: jax.Array,
    stacks: list[Matrices],
    biases: list[jax.Array | None],
    sizes: jax.Array,
    scales: jax.Array | None,
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


def _rounded(x: np.ndarray, work: Work, sizes: np.ndarray, scales: jax.Array | None) -> np.ndarray:
    if work.activations == "none":
        return x
    by_row = None if scales is None else scales[groups_of_rows(len(x), jnp.asarray(sizes, jnp.int32))]
    rounded = quantize_rows(jnp.asarray(x, jnp.float32), work.activations, scales_R=by_row)
    of_columns = np.repeat(np.asarray(rounded.scales, np.float64), rounded.block, axis=1)[:, : x.shape[1]]
    return np.asarray(rounded.values.astype(jnp.float32)).astype(np.float64) * of_columns


def _float64(stack: Matrices, group: int) -> np.ndarray:
    of_group = jax.tree.map(lambda array: array[group : group + 1], stack)
    plain = dequantize(of_group) if isinstance(of_group, QuantizedStack) else of_group.astype(jnp.float32)
    return np.asarray(plain).astype(np.float64).reshape(-1, plain.shape[-1])


def _tolerance(work: Work) -> float:
    return TOLERANCES[work.rows] if work.activations == "none" else ROUNDED_TOLERANCE


def main() -> None:
    """Read lines of work, print a verdict on each."""
    backend, device = sys.argv[1], jax.devices()[0]
    for line in sys.stdin:
        try:
            outcome = try_work(Work.from_json(line), backend, device_kind=device.device_kind)
        except Exception as error:
            short_of_memory = "RESOURCE_EXHAUSTED" in str(error)
            first_line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            outcome = Outcome("untested" if short_of_memory else "crashed", first_line)
        print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    main()
