"""The kernel for Hopper: products of tiles of rows with the matrices of their groups, and what follows them.

A persistent grid over the multiprocessors, and in each block three warpgroups: one keeps bringing tiles of rows and of
matrices to shared memory, by the tensor memory accelerator; two multiply them by wgmma. The loader runs ahead over the ends
of tiles, so that the next is there when a result is written. Letters here, beside the common ones of
docs/concepts/letters.md: G groups, H halves (gate and up, or one), N and K of a matrix [N, K], I row tiles.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT, GroupTiles
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.gather import load_gathered, tell_of_last
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.pipeline import (
    copy_rows_out,
    count_tiles,
    drain,
    each_tile,
    load,
    plgpu,
    swizzled,
    write,
)
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.sums import (
    Call,
    sum_packed,
    sum_quantized_rows,
    sum_scaled_numbers,
    sum_tile,
)
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import (
    COMPUTE_REGISTERS,
    GATHERING_REGISTERS,
    LOADER_REGISTERS,
    WARPGROUPS,
    WGMMA_ROWS,
    Tiles,
    piece_of_results,
    piece_rows_of_results,
    results_are_swizzled,
    scales_numbers,
)
from jaxmoe.kernels.grouped_matmul.quantized import QuantizedStack
from jaxmoe.kernels.grouped_matmul.quantized_rows import QuantizedRows


@partial(jax.jit, static_argnames=("tiles", "finish", "out_dtype", "approximate", "blocks", "interpret"))
def multiply(
    rows_RK: jax.Array | QuantizedRows,
    matrices_GHNK: jax.Array | QuantizedStack,
    biases_GHN: jax.Array | None,
    layout: GroupTiles,
    tiles: Tiles,
    finish: Callable[..., jax.Array],
    out_dtype: jnp.dtype,
    *,
    index_R: jax.Array | None = None,
    approximate: bool,
    blocks: int,
    interpret: bool,
) -> jax.Array:
    """finish(W[g, 0] x + b[g, 0], ...) of each row x, with g its group; rows that no group owns hold anything.

    With `index_R`, int32, the rows are rows[index], which the kernel gathers. Where the inner dimension is split there are
    as many results [splits · R, N], each of one part; biases are in the first. R is a multiple of 8, of an index the next
    one, `blocks` the number of multiprocessors, and `approximate` has exponentials approximated.
    Products of the same sizes and `finish` are one function of a program, so that its layers have the kernel made once.
    """
    quantized = rows_RK if isinstance(rows_RK, QuantizedRows) else None
    if isinstance(rows_RK, QuantizedRows):
        rows_RK = rows_RK.values
    (T, K), R = rows_RK.shape, len(rows_RK if index_R is None else index_R)
    R += -R % ALIGNMENT
    packed = matrices_GHNK if isinstance(matrices_GHNK, QuantizedStack) else None
    call = Call(
        tiles=tiles,
        finish=finish,
        format=packed.format if packed else None,
        block=packed.block if packed else None,
        zeros=packed is not None and packed.zero_points is not None,
        matrix_scaled=packed is not None and packed.matrix_scales is not None,
        scales_numbers=packed is not None and scales_numbers(packed.format, packed.block),
        row_block=quantized.block if quantized else None,
        biased=biases_GHN is not None,
        gathers=index_R is not None,
        interpret=interpret,
    )
    _, H, N, _ = matrices_GHNK.shape
    # Values, scales, zero points and matrix scales of what is packed.
    stored: list[Any] = jax.tree.leaves(matrices_GHNK)
    rows = jnp.moveaxis(rows_RK.reshape(T, K // call.parts, call.parts), -1, 0)
    index = [] if index_R is None else [jnp.clip(index_R, 0, T - 1)]
    # Scales of rows and biases are read without bounds, unlike what the accelerator copies.
    if quantized:
        scales = quantized.scales if index_R is None else quantized.scales[index_R]
        stored.append(jnp.pad(scales.T, ((0, 0), (0, tiles.m))))
    if biases_GHN is not None:
        stored.append(jnp.pad(biases_GHN, ((0, 0), (0, 0), (0, -N % tiles.n))))
    kernel = plgpu.kernel(
        partial(_kernel, call=call),
        out_type=jax.ShapeDtypeStruct((tiles.splits * R, N), out_dtype),
        grid=(blocks,),
        grid_names=("multiprocessor",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(call, H, N, rows.dtype, stored[0].dtype, out_dtype),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=approximate
        ),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    return kernel(*layout, *index, rows, *stored)


def _scratch(call: Call, H: int, N: int, row_dtype: Any, matrix_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    tiles, parts = call.tiles, call.parts
    # The interpreter reads no swizzled tile into registers.
    matrix_layout = () if call.interpret and call.expands else swizzled(tiles.k // parts, matrix_dtype)
    width, slots = piece_of_results(tiles, jnp.dtype(out_dtype).itemsize)
    scratch = {
        "row_tiles": plgpu.SMEM(
            (tiles.stages, parts, tiles.m, tiles.k // parts), row_dtype, transforms=swizzled(call.row_width, row_dtype)
        ),
        "matrix_tiles": plgpu.SMEM(
            (tiles.stages, H, tiles.n, tiles.k // parts), matrix_dtype, transforms=matrix_layout
        ),
        "results": plgpu.SMEM(
            (WARPGROUPS, slots, piece_rows_of_results(tiles), width),
            out_dtype,
            transforms=swizzled(width, out_dtype, rows=1) if results_are_swizzled(tiles, N, out_dtype) else (),
        ),
        "filled": plgpu.Barrier(num_arrivals=(1 if call.gathers else parts) + H, num_barriers=tiles.stages),
        "emptied": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
    }
    if call.interpret and call.expands:
        scratch["expanded"] = plgpu.SMEM((WARPGROUPS, parts, WGMMA_ROWS, call.row_width), jnp.bfloat16)
    return scratch


def _kernel(*refs: Any, call: Call, **scratch: Any) -> None:
    groups, blocks, skips, sizes, used, *index, rows, matrices = refs[: 7 + call.gathers]
    *others, out = refs[7 + call.gathers :]
    tiles = call.tiles
    H, N = matrices.shape[1:3]
    steps = rows.shape[2] * call.parts // (tiles.k * tiles.splits)
    column_tiles = pl.cdiv(N, tiles.n)

    def each(body: Callable[[Any, Any, Any, Any], None]) -> None:
        """body(number of the first stage, row tile, first output, part of the inner dimension) for this block's tiles."""

        def one(i: Any, row: Any, column: Any) -> None:
            body(i * steps, row, lax.rem(column, column_tiles) * tiles.n, lax.div(column, column_tiles))

        each_tile(used[0], column_tiles * tiles.splits, tiles.band, one)

    warpgroup = lax.axis_index("warpgroup")
    to_load, to_compute = GATHERING_REGISTERS if call.gathers else (LOADER_REGISTERS, COMPUTE_REGISTERS)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(to_load, action="decrease")

        @each
        def _(first_stage: Any, row_tile: Any, column: Any, part: Any) -> None:
            row = blocks[row_tile] * ALIGNMENT
            matrix, first_step = matrices.at[groups[row_tile]], part * steps
            if call.gathers:
                sources = (rows, index[0], row, matrix, column)
                load_gathered(call, steps, first_stage, *sources, first_step=first_step, **scratch)
                return
            of_tile = rows.at[:, pl.ds(row, tiles.m)]
            load(steps, first_stage, of_tile, matrix, column, first_step=first_step, **scratch)

        uses = count_tiles(used[0], column_tiles * tiles.splits) * steps
        if call.gathers:
            tell_of_last(call, uses, scratch["filled"])
        drain(uses, tiles.stages, scratch["emptied"])

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(to_compute, action="increase")

        @each
        def _(first_stage: Any, row_tile: Any, column: Any, part: Any) -> None:
            group, row = groups[row_tile], blocks[row_tile] * ALIGNMENT
            first, last = skips[row_tile], skips[row_tile] + sizes[row_tile]
            if call.format:
                of_blocks = [ref.at[group] for ref in others[: 1 + call.zeros]]
                own = (call, H, steps, first_stage, of_blocks, column)
                if call.row_block:
                    sums = sum_quantized_rows(*own, others[-1 - call.biased], row, **scratch)
                else:
                    sums = (sum_scaled_numbers if call.scales_numbers else sum_packed)(*own, **scratch)
            else:
                sums = sum_tile(call, H, steps, first_stage, **scratch)
            if call.matrix_scaled:
                sums = [y * others[1 + call.zeros][group, h, 0] for h, y in enumerate(sums)]
            if call.biased:
                sums = [_add_bias(call, y, others[-1].at[group, h], column, part) for h, y in enumerate(sums)]
            result = call.finish(*sums).astype(out.dtype)
            # Results of parts stand one under another.
            to_row = row + part * (out.shape[0] // tiles.splits)
            _store(call, result, scratch["results"], out, to_row, first, last, column)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _add_bias(call: Call, sums: jax.Array, bias: Any, column: Any, part: Any) -> jax.Array:
    outputs, dim = (call.own_shape[0], 0) if call.tiles.swapped else (call.own_shape[1], 1)
    first = column + lax.axis_index("warpgroup") * outputs if call.tiles.swapped else column
    values = plgpu.load(bias.at[pl.ds(first, outputs)], optimized=False).astype(jnp.float32)
    if call.tiles.splits > 1:
        values *= (part == 0).astype(jnp.float32)
    return sums + lax.broadcast_in_dim(values, call.own_shape, (dim,))


def _store(call: Call, result: jax.Array, results: Any, out: Any, row: Any, first: Any, last: Any, column: Any) -> None:
    """Write the rows from `first` to `last` of a tile that begins at `row`."""
    warpgroup, height = lax.axis_index("warpgroup"), call.own_shape[0]
    slots, rows, width = results.shape[1:]
    if call.tiles.swapped:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        # Neighbors along the rows of a tile change hands, for registers are stored in pairs.
        transposed = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
        write(
            results.at[warpgroup, 0].T, transposed, optimized=results_are_swizzled(call.tiles, out.shape[1], out.dtype)
        )
        plgpu.commit_smem()
        copy_rows_out(results.at[warpgroup, 0], out, row, first, last, column + warpgroup * height)
        return
    above = warpgroup * rows
    # Swizzled: 8 rows of 128 bytes one under another would all be stored to the same banks, one after the other.
    for piece, start in enumerate(range(0, call.tiles.n, width)):
        shared = results.at[warpgroup, piece % slots]
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        shared[...] = result[:, start : start + width]
        plgpu.commit_smem()
        copy_rows_out(shared, out, row + above, first - above, last - above, column + start)
