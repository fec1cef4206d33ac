"""The public grouped products: they check arguments and call a backend.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, K inner dimension, N output dimension.
Groups are the p physical slots of the experts here, or anything else that owns a run of consecutive rows.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul.backends import find_backend, load_backend
from jaxmoe.kernels.grouped_matmul.choose import choose_backend, has_own_gradient
from jaxmoe.kernels.grouped_matmul.combine import combine_halves
from jaxmoe.kernels.grouped_matmul.quantized import Matrices, QuantizedStack, as_matrices
from jaxmoe.kernels.grouped_matmul.quantized_rows import check_row_format
from jaxmoe.kernels.grouped_matmul.row_loops import take_rows
from jaxmoe.kernels.grouped_matmul.work import Work


def grouped_matmul(
    lhs_RK: jax.Array,
    rhs_GNK: Matrices,
    group_sizes_G: jax.Array,
    *,
    activations: str = "none",
    input_scales_G: jax.Array | None = None,
    split_over: tuple[str, ...] = (),
    out_dtype: DTypeLike | None = None,
    backend: str = "auto",
    device_kind: str | None = None,
) -> jax.Array:
    """Multiply each row by the matrix of its group.

    out[r] = rhs[g(r)] @ lhs[r], where group g owns the rows from sum(group_sizes[:g]) up to sum(group_sizes[:g+1]).
    Differentiable, once and in reverse, in lhs and rhs. Packed matrices are constants; they are decoded and scaled in
    float32, and a GPU kernel may round them to the rows' dtype before the product.

    Args:
        lhs_RK: rows, sorted by group. There may be more of them than the groups own: time follows the rows owned.
        rhs_GNK: matrices, one for each group, (out, in) as in torch; of lhs_RK's dtype, or a `QuantizedStack`.
        group_sizes_G: int32, rows of each group; zeros are welcome.
        activations: name in `ROW_FORMATS`, of what rows are rounded to before a product with packed matrices, as
            `quantize_rows` does it: 8 bits with a scale a row ("fp8_token", "int8_token"), for each 128 columns of it
            ("fp8_block", or "fp8_block_e8m0" with powers of two), or one that is given for each group ("fp8_static",
            "int8_static"). "none" leaves them as they are. In gradients it is as if nothing were rounded.
        input_scales_G: float32, the scales of static activations.
        split_over: axes of the `shard_map` over which the columns of rows and matrices are split, for the scales of
            activations: they are those of whole rows. The result is a partial sum, as it is without.
        out_dtype: dtype of the result, lhs_RK's by default. Sums are float32 (float64 for float64 rows) whatever it is.
        backend: name in `BACKENDS` or `GPU_BACKENDS`; or "auto", for what `choose_backend` takes on devices of this kind.
        device_kind: `jax.Device.device_kind` of the devices that it will run on. A GPU backend takes the tiles that were
            measured to be fastest there; without it, or where nothing was measured, its own choice. "mosaic_gpu" has a
            kernel of its own for Blackwell, which it takes only where this says so.

    Returns:
        out_RN. Rows at or beyond sum(group_sizes) are zeros, whatever lhs_RK holds there.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the backend is unknown.
        NotImplementedError: the backend does not run with the installed jax, or does not take matrices so packed.

    >>> import jax.numpy as jnp
    >>> lhs_RK = jnp.ones((3, 2))
    >>> rhs_GNK = jnp.array([[[1.0, 2.0]], [[3.0, 4.0]]])
    >>> grouped_matmul(lhs_RK, rhs_GNK, jnp.array([1, 1], jnp.int32)).tolist()
    [[3.0], [7.0], [0.0]]
    """
    _check_ranks(lhs=(lhs_RK, "RK"), rhs=(rhs_GNK, "GNK"), group_sizes=(group_sizes_G, "G"))
    _check_rows(lhs_RK, group_sizes_G)
    _check_matrix("rhs", rhs_GNK, (rhs_GNK.shape[1], lhs_RK.shape[1]), lhs_RK, group_sizes_G)
    _check_activations(activations, input_scales_G, (len(group_sizes_G),), rhs=rhs_GNK)
    work = Work.product(lhs_RK.dtype, rhs_GNK, activations)
    backend = _choose(work, device_kind, lhs_RK, group_sizes_G) if backend == "auto" else backend
    kernels = load_backend(
        backend,
        rhs_GNK,
        activations=activations,
        input_scales=input_scales_G,
        split_over=split_over,
        portable_gradient=not has_own_gradient(backend, work, device_kind),
    )
    return kernels.grouped_matmul(
        lhs_RK,
        as_matrices(rhs_GNK),
        group_sizes_G,
        out_dtype=jnp.dtype(out_dtype or lhs_RK.dtype),
        device_kind=device_kind,
    )


def expert_mlp(
    x_RD: jax.Array,
    w_gate_up_p2FD: Matrices,
    w_down_pDF: Matrices,
    group_sizes_p: jax.Array,
    *,
    index_R: jax.Array | None = None,
    b_gate_up_p2F: jax.Array | None = None,
    b_down_pD: jax.Array | None = None,
    activation: str = "silu",
    limit: float | None = None,
    activations: str = "none",
    input_scales_p2: jax.Array | None = None,
    split_over: tuple[str, ...] = (),
    out_dtype: DTypeLike | None = None,
    zeros_beyond: bool = True,
    backend: str = "auto",
    device_kind: str | None = None,
) -> jax.Array:
    """Pass each row through the gated feed-forward network of its expert (Shazeer, 2020, "GLU Variants").

    y = W_down[g] @ h + b_down[g], with h = act(W_gate[g] @ x + b_gate[g]) * (W_up[g] @ x + b_up[g]) rounded to
    x's dtype. A stack with one matrix in its second dim has no gate: h = act(W_up[g] @ x + b_up[g]).

    Where F is split over devices the results are partial sums: add them up afterwards, in an `out_dtype` of your
    choice, and give `b_down_pD` to one of the devices only.

    Differentiable, once and in reverse, in rows, matrices and biases; the gradient keeps no activation. Packed matrices
    are as in `grouped_matmul`.

    Args:
        x_RD: rows sorted by physical slot, possibly followed by unused ones; rows [T, D] in any order with an index.
        w_gate_up_p2FD: gate at [:, 0], up at [:, 1]; or up alone at [:, 0]. Of x_RD's dtype, or a `QuantizedStack`.
        w_down_pDF: matrices of the second product, of x_RD's dtype, or a `QuantizedStack`, whatever the first are.
        group_sizes_p: int32, rows of each slot; zeros are welcome.
        index_R: int32, the row of x at each of R places, which are sorted by slot: as if x[index_R] were given, but a GPU
            kernel gathers the rows itself, where it can. All of it is in range, also at places that no slot owns.
        b_gate_up_p2F: biases of the first product.
        b_down_pD: biases of the second.
        activation: name in `ACTIVATIONS` or `CLAMPED`, computed in the sums' dtype.
        limit: limit of a clamped activation.
        activations: name in `ROW_FORMATS`, of what x and h are rounded to before their products, as in `grouped_matmul`.
        input_scales_p2: float32, the scales of static activations: of x at [:, 0], of h at [:, 1].
        split_over: axes of the `shard_map` over which F is split, for the scales of h, as in `grouped_matmul`.
        out_dtype: dtype of the result, x_RD's by default. Sums are float32 (float64 for float64 rows) whatever it is.
        zeros_beyond: flag that rows of the result that no slot owns are zeros. Without it they may hold anything, NaN
            included, for a caller who reads none of them: a GPU kernel need not be followed by a count of the others.
        backend: name in `BACKENDS` or `GPU_BACKENDS`; or "auto", for what `choose_backend` takes on devices of this kind.
        device_kind: `jax.Device.device_kind` of the devices that it will run on. A GPU backend takes the tiles that were
            measured to be fastest there; without it, or where nothing was measured, its own choice. "mosaic_gpu" has a
            kernel of its own for Blackwell, which it takes only where this says so.

    Returns:
        y_RD. Rows at or beyond sum(group_sizes) are zeros, whatever x_RD holds there, or the rows that their index names;
        see `zeros_beyond`.

    Raises:
        ValueError: the shapes or dtypes do not fit together, or the activation or backend is unknown.
        NotImplementedError: the backend does not run with the installed jax, or does not take matrices so packed.

    >>> import jax.numpy as jnp
    >>> w_gate_up_p2FD, w_down_pDF = jnp.ones((2, 2, 3, 4)), jnp.ones((2, 4, 3))
    >>> group_sizes_p = jnp.array([0, 5], jnp.int32)
    >>> expert_mlp(jnp.ones((8, 4)), w_gate_up_p2FD, w_down_pDF, group_sizes_p, activation="relu")[:, 0].tolist()
    [48.0, 48.0, 48.0, 48.0, 48.0, 0.0, 0.0, 0.0]
    """
    _check_ranks(
        x=(x_RD, "RD"),
        w_gate_up=(w_gate_up_p2FD, "p2FD"),
        w_down=(w_down_pDF, "pDF"),
        group_sizes=(group_sizes_p, "p"),
    )
    _check_rows(x_RD, group_sizes_p)
    _check_index(index_R, x_RD)
    D, F = x_RD.shape[1], w_down_pDF.shape[2]
    p, halves = w_gate_up_p2FD.shape[:2]
    if halves not in (1, 2):
        raise ValueError(f"w_gate_up holds gate and up, or up alone, in its second dim; got {w_gate_up_p2FD.shape}")
    _check_matrix("w_gate_up", w_gate_up_p2FD, (halves, F, D), x_RD, group_sizes_p)
    _check_matrix("w_down", w_down_pDF, (D, F), x_RD, group_sizes_p)
    for name, bias, shape in (("b_gate_up", b_gate_up_p2F, (p, halves, F)), ("b_down", b_down_pD, (p, D))):
        if bias is not None and bias.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit the matrices; got {bias.shape}.")
    _check_activations(activations, input_scales_p2, (p, 2), w_gate_up=w_gate_up_p2FD, w_down=w_down_pDF)
    stacks = w_gate_up_p2FD, w_down_pDF
    work = Work.mlp(
        x_RD.dtype,
        *stacks,
        biases=b_gate_up_p2F is not None,
        activation=activation,
        limit=limit,
        activations=activations,
    )
    places = x_RD if index_R is None else index_R
    backend = _choose(work, device_kind, places, group_sizes_p) if backend == "auto" else backend
    entry = find_backend(backend)
    more: dict[str, Any] = {}
    if index_R is not None and entry.gathers_rows(activations):
        more["index_R"] = index_R
    else:
        x_RD = take_rows(x_RD, index_R)
    if entry.adds_zeros and not zeros_beyond:
        more["zeros_beyond"] = False
    kernels = load_backend(
        backend,
        *stacks,
        activations=activations,
        input_scales=input_scales_p2,
        split_over=split_over,
        portable_gradient=not has_own_gradient(backend, work, device_kind),
    )
    return kernels.expert_mlp(
        x_RD,
        as_matrices(w_gate_up_p2FD),
        as_matrices(w_down_pDF),
        group_sizes_p,
        b_up_pN=None if b_gate_up_p2F is None else b_gate_up_p2F.reshape(p, halves * F),
        b_down_pD=b_down_pD,
        combine=combine_halves(activation, limit, gated=halves == 2),
        out_dtype=jnp.dtype(out_dtype or x_RD.dtype),
        device_kind=device_kind,
        **more,
    )


def _choose(work: Work, device_kind: str | None, rows: jax.Array, group_sizes: jax.Array) -> str:
    return choose_backend(work, device_kind, rows_per_group=len(rows) / max(len(group_sizes), 1)).backend


def _check_ranks(**arrays: tuple[Matrices, str]) -> None:
    for name, (array, dims) in arrays.items():
        if array.ndim != len(dims):
            raise ValueError(
                f"{name} must have {len(dims)} dimensions, [{', '.join(dims)}]; got shape {array.shape}. "
                "Reshape it, or see the docstring for the layout."
            )


def _check_rows(rows: jax.Array, group_sizes: jax.Array) -> None:
    if not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(f"rows must be floating point; got {rows.dtype}. Convert them with astype.")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"group_sizes must be int32; got {group_sizes.dtype}. Convert with astype(jnp.int32).")


def _check_index(index: jax.Array | None, rows: jax.Array) -> None:
    if index is None:
        return
    if index.ndim != 1 or index.dtype != jnp.int32:
        raise ValueError(f"index must be int32 [R], a row of x each; got {index.dtype} {index.shape}. Convert it.")
    if len(index) and not len(rows):
        raise ValueError(f"index names {len(index)} rows, and x has none; got shape {rows.shape}. Give it rows.")


def _check_activations(activations: str, scales: jax.Array | None, shape: tuple[int, ...], **stacks: Matrices) -> None:
    if check_row_format(activations, scales is not None) is None:
        return
    for name, stack in stacks.items():
        if not isinstance(stack, QuantizedStack):
            raise ValueError(
                f"activations {activations!r} go with packed matrices; {name} is {stack.dtype}. Use 'none'."
            )
    if scales is not None and (scales.shape != shape or scales.dtype != jnp.float32):
        raise ValueError(
            f"input_scales must be float32 of shape {shape}; got {scales.dtype} of shape {scales.shape}. Reshape or "
            "convert them."
        )


def _check_matrix(name: str, matrix: Matrices, shape: tuple[int, ...], rows: jax.Array, group_sizes: jax.Array) -> None:
    if isinstance(matrix, QuantizedStack):
        matrix.check(name)
    expected = (group_sizes.shape[0], *shape)
    if matrix.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected} to fit rows of shape {rows.shape} and {group_sizes.shape[0]} groups; "
            f"got {matrix.shape}. Weights are (out, in) as in torch: transpose the last two dims if they are (in, out)."
        )
    if not isinstance(matrix, QuantizedStack) and matrix.dtype != rows.dtype:
        raise ValueError(
            f"{name} must have the dtype of the rows, {rows.dtype}; got {matrix.dtype}. Convert one of them with astype."
        )
