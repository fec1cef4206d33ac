"""The two public products in terms of the kernels, with gradients by kernels or those of the portable backend.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K].
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.hardware import GPU, GPUS
from jaxmoe.kernels.grouped_matmul import portable
from jaxmoe.kernels.grouped_matmul.backends import Kernels
from jaxmoe.kernels.grouped_matmul.combine import KERNEL_ACTIVATIONS, OF_EXPONENTIALS, Combine
from jaxmoe.kernels.grouped_matmul.gpu import multiprocessors
from jaxmoe.kernels.grouped_matmul.gradient import with_gradient_of, with_pullback
from jaxmoe.kernels.grouped_matmul.gradient_products import mlp_gradients, product_gradients
from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT
from jaxmoe.kernels.grouped_matmul.mosaic_gpu import blackwell, kernel, splits
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.blackwell_tiles import BlackwellProblem, is_blackwell
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.choice import choose_tiles
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.gradient_products import HopperProducts, missing_gradient
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import WGMMA_ROWS, Problem, Tiles, inner_tile
from jaxmoe.kernels.grouped_matmul.quantized import FORMATS, Matrices, QuantizedStack
from jaxmoe.kernels.grouped_matmul.quantized_rows import OnRoundedRows, QuantizedRows, quantize_rows, scales_of_rows
from jaxmoe.kernels.grouped_matmul.row_loops import owned_only, take_rows
from jaxmoe.kernels.grouped_matmul.tile_table import measured_tiles

# Blocks, or clusters of them, in the interpreter: more than one, so that tiles are shared out.
INTERPRETED_BLOCKS = 2


def grouped_matmul(
    lhs_RK: jax.Array,
    rhs_GNK: Matrices,
    group_sizes_G: jax.Array,
    *,
    out_dtype: jnp.dtype,
    tiles: Tiles | None = None,
    device_kind: str | None = None,
    activations: str = "none",
    input_scales: jax.Array | None = None,
    split_over: tuple[str, ...] = (),
    portable_gradient: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r]; see `Kernels.grouped_matmul`.

    `tiles` are looked up or chosen unless given. Rows are quantized first if `activations` are named. The gradient is by
    kernels where they are made for it (`missing_gradient`) and the portable one is not asked for.
    """
    measured = measured_tiles(Tiles, device_kind, "mosaic_gpu", lhs_RK, rhs_GNK, out_dtype)

    def forward(arrays: Any, group_sizes_G: jax.Array) -> jax.Array:
        lhs_RK, rhs_GNK, scales_G = arrays
        rows = _quantized(lhs_RK, activations, group_sizes_G, scales_G, split_over)
        options = (out_dtype, (tiles, measured), device_kind, interpret)
        return _product(rows, rhs_GNK, None, group_sizes_G, _identity, 1, *options)

    def same(arrays: Any, group_sizes_G: jax.Array) -> jax.Array:
        lhs_RK, rhs_GNK, scales = arrays
        backend = _portable(activations, scales, split_over)
        return backend.grouped_matmul(lhs_RK, rhs_GNK, group_sizes_G, out_dtype=out_dtype)

    def pullback(arrays: Any, group_sizes_G: jax.Array, dy: jax.Array) -> Any:
        lhs_RK, rhs_GNK, _ = arrays
        return *product_gradients(_products(device_kind, interpret), lhs_RK, rhs_GNK, group_sizes_G, dy), None

    arrays = (lhs_RK, rhs_GNK, input_scales)
    if portable_gradient or missing_gradient(lhs_RK, rhs_GNK, device_kind=device_kind):
        return owned_only(with_gradient_of(same, forward, arrays, group_sizes_G), group_sizes_G)
    return owned_only(with_pullback(pullback, forward, arrays, group_sizes_G), group_sizes_G)


def expert_mlp(
    x_RD: jax.Array,
    w_up_pND: Matrices,
    w_down_pDF: Matrices,
    group_sizes_p: jax.Array,
    *,
    b_up_pN: jax.Array | None,
    b_down_pD: jax.Array | None,
    combine: Combine,
    out_dtype: jnp.dtype,
    index_R: jax.Array | None = None,
    zeros_beyond: bool = True,
    tiles: tuple[Tiles | None, Tiles | None] = (None, None),
    device_kind: str | None = None,
    activations: str = "none",
    input_scales: jax.Array | None = None,
    split_over: tuple[str, ...] = (),
    portable_gradient: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """y = W_down[g] @ combine(W_up[g] @ x + b_up[g]) + b_down[g]; see `Kernels.expert_mlp`.

    With an index, x are the rows x[index]. Without `zeros_beyond` results hold anything in rows that no group owns. `tiles`
    are those of the first and of the second product, looked up or chosen unless given. x and h are quantized before them if
    `activations` are named, and x before it is gathered. The gradient is as of `grouped_matmul`.
    """
    places = jax.eval_shape(take_rows, x_RD, index_R)
    measured_up = measured_tiles(Tiles, device_kind, "mosaic_gpu.gate_up", places, w_up_pND, x_RD.dtype)
    measured_down = measured_tiles(Tiles, device_kind, "mosaic_gpu", places, w_down_pDF, out_dtype)
    halves = 2 if combine.gated else 1
    finish = _combined(combine)
    approximate = combine.activation in OF_EXPONENTIALS and x_RD.dtype.itemsize == 2

    def forward(arrays: Any, groups: Any) -> jax.Array:
        (x_RD, w_up, w_down, b_up, b_down, scales_p2), (group_sizes_p, index_R) = arrays, groups
        scales = (None, None) if scales_p2 is None else (scales_p2[:, 0], scales_p2[:, 1])
        up = (x_RD.dtype, (tiles[0], measured_up), device_kind, interpret)
        down = (out_dtype, (tiles[1], measured_down), device_kind, interpret)
        if scales_p2 is not None:  # of groups, so a row that several have is rounded in as many ways
            x_RD, index_R = take_rows(x_RD, index_R), None
        rows = _quantized(x_RD, activations, group_sizes_p, scales[0])
        h_RF = _product(rows, w_up, b_up, group_sizes_p, finish, halves, *up, index_R=index_R, approximate=approximate)
        rows = _quantized(h_RF, activations, group_sizes_p, scales[1], split_over)
        return _product(rows, w_down, b_down, group_sizes_p, _identity, 1, *down)

    def same(arrays: Any, groups: Any) -> jax.Array:
        (x_RD, w_up, w_down, b_up, b_down, scales), (group_sizes_p, index_R) = arrays, groups
        x_RD = take_rows(x_RD, index_R)
        return _portable(activations, scales, split_over).expert_mlp(
            x_RD, w_up, w_down, group_sizes_p, b_up_pN=b_up, b_down_pD=b_down, combine=combine, out_dtype=out_dtype
        )

    def pullback(arrays: Any, groups: Any, dy: jax.Array) -> Any:
        (x, w_up, w_down, b_up, b_down, _), (group_sizes_p, index_R) = arrays, groups
        x_RD, give_back = jax.vjp(partial(take_rows, index_R=index_R), x)
        products = _products(device_kind, interpret)
        dx_RD, *others = mlp_gradients(products, x_RD, w_up, w_down, b_up, b_down, group_sizes_p, dy, combine)
        return *give_back(dx_RD), *others, None

    arrays, groups = (x_RD, w_up_pND, w_down_pDF, b_up_pN, b_down_pD, input_scales), (group_sizes_p, index_R)
    if portable_gradient or missing_gradient(places, w_up_pND, w_down_pDF, device_kind=device_kind):
        y_RD = with_gradient_of(same, forward, arrays, groups)
    else:
        y_RD = with_pullback(pullback, forward, arrays, groups)
    return owned_only(y_RD, group_sizes_p) if zeros_beyond else y_RD


def _products(device_kind: str | None, interpret: bool) -> HopperProducts:
    def by_rows(x: jax.Array, w: jax.Array, b: jax.Array | None, sizes: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        return _product(x, w, b, sizes, _identity, 1, out_dtype, (None, None), device_kind, interpret)

    return HopperProducts(by_rows, _blocks(device_kind, GPUS["h100"], interpret), interpret)


def _portable(activations: str, input_scales: jax.Array | None, split_over: tuple[str, ...]) -> Kernels:
    return portable if activations == "none" else OnRoundedRows(portable, activations, input_scales, split_over)


def _quantized(
    rows_RK: jax.Array,
    activations: str,
    group_sizes_G: jax.Array,
    scales_G: jax.Array | None,
    split_over: tuple[str, ...] = (),
) -> jax.Array | QuantizedRows:
    if activations == "none":
        return rows_RK
    scales_R = scales_of_rows(rows_RK.shape[0], group_sizes_G, scales_G)
    return quantize_rows(rows_RK, activations, scales_R=scales_R, split_over=split_over)


def problem_of(
    rows: jax.Array | QuantizedRows,
    matrices: Matrices,
    halves: int,
    out_dtype: jnp.dtype,
    device_kind: str | None = None,
) -> Problem:
    """Make the problem of rows [R, K] and matrices [G, halves·N, K]; on Hopper, unless `device_kind` is newer.

    Raises:
        NotImplementedError: the kernel does not multiply those dtypes, or matrices so packed.
    """
    G, N, K = matrices.shape
    packed = isinstance(matrices, QuantizedStack)
    row_block = None
    if isinstance(rows, QuantizedRows):
        row_block, rows = rows.block, rows.values
        if not isinstance(matrices, QuantizedStack) or matrices.values.dtype != rows.dtype:
            raise NotImplementedError(
                f"the mosaic_gpu kernel multiplies quantized rows with matrices of their dtype, {rows.dtype}; got "
                f"{matrices.format if isinstance(matrices, QuantizedStack) else matrices.dtype}: use the portable one"
            )
    allowed = (jnp.bfloat16,) if packed else (jnp.bfloat16, jnp.float16)
    if row_block is None and rows.dtype not in allowed:
        names = " and ".join(jnp.dtype(dtype).name for dtype in allowed)
        raise NotImplementedError(
            f"the mosaic_gpu kernel multiplies rows of {names}{' with packed matrices' if packed else ''}; got "
            f"{rows.dtype}: use the portable one"
        )
    kind = BlackwellProblem if is_blackwell(device_kind) else Problem
    problem = kind(R=rows.shape[0], G=G, halves=halves, N=N // halves, K=K, out_bytes=jnp.dtype(out_dtype).itemsize)
    if not isinstance(matrices, QuantizedStack):
        return problem
    if kind is BlackwellProblem:
        raise NotImplementedError(
            f"the mosaic_gpu kernel takes no packed matrices on Blackwell ({device_kind}), here {matrices.format}: use the "
            "portable one, or `dequantize` them first"
        )
    if matrices.matrix_scales is not None and matrices.matrix_scales.shape[1] != halves:
        raise NotImplementedError(
            f"the mosaic_gpu kernel takes one of matrix_scales for a matrix; got {matrices.matrix_scales.shape[1]} for "
            f"{halves}: use the portable one"
        )
    weight_bits = 8 // FORMATS[matrices.format].per_byte
    problem = dataclasses.replace(problem, weight_bits=weight_bits, block=matrices.block, format=matrices.format)
    return dataclasses.replace(problem, row_bytes=rows.dtype.itemsize, row_block=row_block)


def _product(
    rows_RK: jax.Array | QuantizedRows,
    matrices_GNK: Matrices,
    biases_GN: jax.Array | None,
    group_sizes_G: jax.Array,
    finish: Callable[..., jax.Array],
    halves: int,
    out_dtype: jnp.dtype,
    given_or_measured: tuple[Tiles | None, Tiles | None],
    device_kind: str | None,
    interpret: bool,
    *,
    index_R: jax.Array | None = None,
    approximate: bool = False,
) -> jax.Array:
    """The kernel on rows [R, K] and matrices [G, halves·N, K]; anything in rows that no group owns.

    With an index, on those of rows [T, K] that it names, which the kernel gathers, on Hopper. Exponentials may be off by
    some 10^-5 of themselves if `approximate`, on Hopper, except where scales are powers of two, which the kernel has of the
    same function.
    """
    places = jax.eval_shape(take_rows, rows_RK, index_R)
    R, (G, _, K) = len(jax.tree.leaves(places)[0]), matrices_GNK.shape
    N = matrices_GNK.shape[1] // halves
    if 0 in (R, G, N, K):
        return jnp.zeros((R, N), out_dtype)
    if isinstance(matrices_GNK, QuantizedStack):
        matrices_GNK = _scale_each_output(matrices_GNK, N)
    problem = problem_of(places, matrices_GNK, halves, out_dtype, device_kind)
    # Where a last stage goes on beyond the inner dimension, the accelerator copies zeros, but threads what is there.
    if isinstance(problem, BlackwellProblem) or K % inner_tile(problem):
        rows_RK, index_R = take_rows(rows_RK, index_R), None
    problem = dataclasses.replace(problem, gathered=index_R is not None)
    given, measured = given_or_measured
    if given:
        problem.check(given)
    elif measured and not problem.fits(measured):  # of a result of fewer bytes, or of rows that nothing gathers
        measured = None
    tiles = given or measured or choose_tiles(problem)

    def by_half(array: jax.Array) -> jax.Array:
        return array.reshape(G, halves, array.shape[1] // halves, *array.shape[2:])

    if index_R is None:
        rows_RK = jax.tree.map(lambda array: jnp.pad(array, ((0, -R % ALIGNMENT), (0, 0))), rows_RK)
    multiply: Callable[..., jax.Array]
    if isinstance(problem, BlackwellProblem):
        multiply, known = blackwell.multiply, GPUS["b200"]
    elif tiles.splits > 1:
        multiply, known = splits.multiply, GPUS["h100"]
    else:
        of_powers = isinstance(matrices_GNK, QuantizedStack) and matrices_GNK.scales.dtype == jnp.uint8
        multiply = partial(kernel.multiply, approximate=approximate and not of_powers)
        known = GPUS["h100"]
    out = multiply(
        rows_RK,
        jax.tree.map(by_half, matrices_GNK),
        None if biases_GN is None else by_half(biases_GN),
        group_sizes_G.astype(jnp.int32),
        tiles,
        finish,
        out_dtype,
        blocks=_blocks(device_kind, known, interpret, tiles.cluster),
        interpret=interpret,
        **({} if index_R is None else {"index_R": index_R}),
    )
    return out[:R]


def _blocks(device_kind: str | None, known: GPU, interpret: bool, cluster: int = 1) -> int:
    return INTERPRETED_BLOCKS * cluster if interpret else multiprocessors(device_kind, known)


def _scale_each_output(stack: QuantizedStack, N: int) -> QuantizedStack:
    """The same stack of halves of N outputs; scales that the kernel cannot read one for 64 are repeated, one for each.

    They are far smaller than the numbers are. Mosaic GPU reads a float8 as part of an array, but not alone.
    """
    bn, bk = stack.block
    if bn == 1 or (bn % WGMMA_ROWS == 0 and N % WGMMA_ROWS == 0 and stack.scales.dtype != jnp.float8_e4m3fn):
        return stack
    scales, zero_points = jax.tree.map(lambda array: jnp.repeat(array, bn, axis=1), (stack.scales, stack.zero_points))
    return dataclasses.replace(stack, scales=scales, zero_points=zero_points, block=(1, bk))


@lru_cache
def _combined(combine: Combine) -> Callable[..., jax.Array]:
    """The step between the products as a kernel has it; the same function each time, by which kernels are told apart."""
    return partial(combine.halves, activations=KERNEL_ACTIVATIONS)


def _identity(sums: jax.Array) -> jax.Array:
    return sums
