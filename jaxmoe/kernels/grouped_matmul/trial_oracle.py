"""The oracle of trials: results and gradients of work in float64, on the host.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from jaxmoe.kernels.grouped_matmul.quantized import Matrices, QuantizedStack, dequantize
from jaxmoe.kernels.grouped_matmul.quantized_rows import groups_of_rows, quantize_rows
from jaxmoe.kernels.grouped_matmul.work import Work


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
    x = _wide(rows)
    for number, (stack, bias) in enumerate(zip(stacks, biases, strict=True)):
        own_scales = scales if scales is None or scales.ndim == 1 else scales[:, number]
        x = _rounded(x, work, sizes, own_scales)
        out = np.concatenate([x[groups == group] @ _float64(stack, group).T for group in range(len(sizes))])
        if bias is not None:
            out += _wide(bias).reshape(len(sizes), -1)[groups]
        if number == 0 and work.activation is not None:
            combine = combine_halves(work.activation, work.limit, gated=work.matrices[0].shape[0] == 2)
            # h is rounded to the rows' dtype, which matters where that decides between two numbers of 8 bits.
            out = np.asarray(combine(jnp.asarray(out, jnp.float32)).astype(work.rows).astype(jnp.float32), np.float64)
        x = out
    return x


def exact_gradients(
    work: Work,
    rows: jax.Array,
    stacks: list[jax.Array],
    biases: list[jax.Array | None],
    sizes: np.ndarray,
    dy: jax.Array,
) -> list[np.ndarray]:
    """Compute the gradients of Σ dy · y in rows, stacks and biases, in that order; halves of a stack are one matrix here.

    Args:
        work: products of plain matrices.
        rows: [R, K], each of a group.
        stacks: matrices of the products, a stack each.
        biases: biases of the products, None where there are none.
        sizes: rows of each group.
        dy: cotangent of the results of those rows.
    """
    ends = np.cumsum(sizes)
    of_group = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    # A group's matrix at a time, and float32 for what is kept: stacks are large.
    def by_columns(dy: np.ndarray, stack: jax.Array) -> np.ndarray:
        return np.concatenate([dy[own] @ _float64(stack, group) for group, own in enumerate(of_group)])

    def outer(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.stack([(dy[own].T @ x[own]).astype(np.float32) for own in of_group])

    x, dy_RN = _wide(rows), _wide(dy)
    if work.activation is None:
        return [by_columns(dy_RN, stacks[0]), outer(dy_RN, x)]
    w_up, w_down = stacks
    a = np.concatenate([x[own] @ _float64(w_up, group).T for group, own in enumerate(of_group)])
    if biases[0] is not None:
        a += np.repeat(_wide(biases[0]).reshape(len(sizes), -1), sizes, axis=0)
    combine = combine_halves(work.activation, work.limit, gated=work.matrices[0].shape[0] == 2)
    h, pullback = jax.vjp(combine, jnp.asarray(a, jnp.float32))
    (da,) = map(_wide, pullback(jnp.asarray(by_columns(dy_RN, w_down), jnp.float32)))
    of_biases = [
        np.stack([of_rows[own].sum(axis=0) for own in of_group])
        for of_rows, bias in zip((da, dy_RN), biases, strict=True)
        if bias is not None
    ]
    return [by_columns(da, w_up), outer(da, x), outer(dy_RN, _wide(h)), *of_biases]


def _rounded(x: np.ndarray, work: Work, sizes: np.ndarray, scales: jax.Array | None) -> np.ndarray:
    if work.activations == "none":
        return x
    by_row = None if scales is None else scales[groups_of_rows(len(x), jnp.asarray(sizes, jnp.int32))]
    rounded = quantize_rows(jnp.asarray(x, jnp.float32), work.activations, scales_R=by_row)
    of_columns = np.repeat(np.asarray(rounded.scales, np.float64), rounded.block, axis=1)[:, : x.shape[1]]
    return np.asarray(rounded.values.astype(jnp.float32)).astype(np.float64) * of_columns


def _float64(stack: Matrices, group: int) -> np.ndarray:
    of_group = jax.tree.map(lambda array: array[group : group + 1], stack)
    plain = dequantize(of_group) if isinstance(of_group, QuantizedStack) else of_group
    return _wide(plain).reshape(-1, plain.shape[-1])


def _wide(array: jax.Array) -> np.ndarray:
    return np.asarray(array.astype(jnp.float32)).astype(np.float64)
