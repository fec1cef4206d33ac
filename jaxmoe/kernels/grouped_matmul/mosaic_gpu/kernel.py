"""The kernel for Hopper: products of tiles of rows with the matrices of their groups, and what follows them.

A persistent grid over the multiprocessors, and in each block three warpgroups: one keeps bringing tiles of rows and of
matrices to shared memory, by the tensor memory accelerator; two multiply them by wgmma. The loader runs ahead over the ends
of tiles, so that the next is there when a result is written. Letters here, beside the common ones of
docs/concepts/letters.md: G groups, H halves (gate and up, or one), N and K of a matrix [N, K].

Where `Tiles.cluster` is 2, the two blocks of a cluster multiply the same rows, by neighboring tiles of outputs. Each reads
its own matrices and one half of the rows, which the accelerator writes to both (multicast). No GPU has run this, and the
interpreter has each block read all rows by itself, so here is why nobody waits for ever, or writes where somebody reads:

- Both blocks go through the same stages in the same order, for their tiles differ in the outputs alone.
- `filled` is a block's own. Its phase ends when the block's own loader has arrived with each copy, and all bytes of these
  have come. Those of the neighbor's half may come before that arrival, but not before the phase begins, by what follows.
- `emptied` has a phase of four arrivals: two warpgroups of each block, each of which arrives at the barriers of both
  blocks. So a loader that has waited for its own knows that nobody in either block reads the place any more, and that both
  have seen the end of its phase of `filled`.
- Nobody waits in a circle. Take the earliest stage that a warpgroup has not multiplied. All stages before it are
  multiplied, and given back but for the one before, whose place is another one, as there are two at least
  (`least_stages`). So neither loader waits any more to load that stage, and it comes.
- No block ends while the other may write to its memory or arrive at its barriers, for it does not end before its loader,
  which `drain` has wait for the last phase of `emptied` of each place. By then the neighbor has read, so received, all that
  it is sent, and has made its last arrival here. Nobody uses a barrier before it is there, for Mosaic GPU has the blocks
  of a cluster wait for each other when they have made theirs.

One thread of a warpgroup arrives for all of it at the barriers of a cluster. That is enough after `wgmma_wait`, but not
where threads read a stage into registers, as they do of packed matrices: `Problem.clusters` has none of these.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT, GroupTiles, offsets_shape
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.gather import load_gathered, tell_of_last
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.pipeline import (
    compiler_params,
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

# Axis of the blocks of a cluster.
NEIGHBORS = "neighbors"


@partial(jax.jit, static_argnames=("tiles", "finish", "out_dtype", "approximate", "blocks", "interpret"))
def multiply(
    rows_RK: jax.Array | QuantizedRows,
    matrices_GHNK: jax.Array | QuantizedStack,
    biases_GHN: jax.Array | None,
    group_sizes_G: jax.Array,
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
        K=K,
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
    G, H, N, _ = matrices_GHNK.shape
    # Values, scales, zero points and matrix scales of what is packed.
    stored: list[Any] = jax.tree.leaves(matrices_GHNK)
    rows = jnp.moveaxis(rows_RK.reshape(T, K // call.parts, call.parts), -1, 0)
    index = [] if index_R is None else [index_R]
    # Scales of rows and biases are read without bounds, unlike what the accelerator copies.
    if quantized:
        scales = quantized.scales if index_R is None else quantized.scales[index_R]
        stored.append(jnp.pad(scales.T, ((0, 0), (0, tiles.m))))
    if biases_GHN is not None:
        stored.append(jnp.pad(biases_GHN, ((0, 0), (0, 0), (0, -N % (tiles.cluster * tiles.n)))))
    clusters = {"cluster": (tiles.cluster,), "cluster_names": (NEIGHBORS,)} if tiles.cluster > 1 else {}
    kernel = plgpu.kernel(
        partial(_kernel, call=call),
        out_type=jax.ShapeDtypeStruct((tiles.splits * R, N), out_dtype),
        # With clusters the axis counts these: pairs of multiprocessors.
        grid=(blocks // tiles.cluster,),
        grid_names=("multiprocessor",),
        **clusters,
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(call, G, H, N, rows.dtype, stored[0].dtype, out_dtype),
        compiler_params=compiler_params(own_barriers=True, approximate=approximate),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    return kernel(group_sizes_G, *index, rows, *stored)


def _scratch(call: Call, G: int, H: int, N: int, row_dtype: Any, matrix_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    tiles, parts = call.tiles, call.parts
    if call.interpret and call.expands:  # it reads no swizzled tile into registers
        matrix_layout: tuple[Any, ...] = ()
    elif call.K % tiles.k:  # bytes of a matrix whose rows are no whole swizzles, for registers as well
        matrix_layout = (plgpu.TilingTransform((ALIGNMENT, 16)),)
    else:
        matrix_layout = swizzled(tiles.k // parts, matrix_dtype)
    width, slots = piece_of_results(tiles, jnp.dtype(out_dtype).itemsize)
    make_emptied = plgpu.Barrier
    if tiles.cluster > 1:
        make_emptied = partial(plgpu.ClusterBarrier, collective_axes=(NEIGHBORS,))
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
        "emptied": make_emptied(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
        "offsets": plgpu.SMEM(offsets_shape(G), jnp.int32),
        "added": plgpu.Barrier(num_arrivals=1),
    }
    if call.interpret and call.expands:
        scratch["expanded"] = plgpu.SMEM((WARPGROUPS, parts, WGMMA_ROWS, call.chunk // parts), jnp.bfloat16)
    return scratch


def _kernel(*refs: Any, call: Call, **scratch: Any) -> None:
    group_sizes, *index, rows, matrices = refs[: 3 + call.gathers]
    *others, out = refs[3 + call.gathers :]
    tiles = call.tiles
    layout = GroupTiles(group_sizes, scratch["offsets"], out.shape[0] // tiles.splits, tiles.m)
    H, N = matrices.shape[1:3]
    # The last goes on beyond the inner dimension where that is no multiple of k: zeros come.
    steps = pl.cdiv(call.K, tiles.k * tiles.splits)
    # Each of as many tiles as a cluster has blocks; the last may lie beyond the matrix: zeros come, and nothing is stored.
    column_tiles = pl.cdiv(N, tiles.n * tiles.cluster)
    neighbor = lax.axis_index(NEIGHBORS) if tiles.cluster > 1 else 0

    def each(body: Callable[[Any, Any, Any, Any], None]) -> None:
        """body(number of the first stage, row tile, first output, part of the inner dimension) for this block's tiles."""

        def one(i: Any, row: Any, column: Any) -> None:
            first = (lax.rem(column, column_tiles) * tiles.cluster + neighbor) * tiles.n
            if call.format and N % WGMMA_ROWS:
                # Scales are read without bounds. What two tiles have in common they store alike.
                first = jnp.minimum(first, N - tiles.n)
            body(i * steps, row, first, lax.div(column, column_tiles))

        each_tile(layout.used, column_tiles * tiles.splits, tiles.band, one)

    warpgroup = lax.axis_index("warpgroup")
    to_load, to_compute = GATHERING_REGISTERS if call.gathers else (LOADER_REGISTERS, COMPUTE_REGISTERS)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        layout.fill()
        plgpu.barrier_arrive(scratch["added"])
        plgpu.set_max_registers(to_load, action="decrease")

        @each
        def _(first_stage: Any, row_tile: Any, column: Any, part: Any) -> None:
            group = layout.group_of(row_tile)
            row, _, _ = layout.place(row_tile, group)
            matrix, first_step = matrices.at[group], part * steps
            if call.gathers:
                sources = (rows, index[0], row, matrix, column)
                load_gathered(call, steps, first_stage, *sources, first_step=first_step, **scratch)
                return
            of_tile = rows.at[:, pl.ds(row, tiles.m)]
            shared_by = NEIGHBORS if tiles.cluster > 1 else None
            load(
                steps, first_stage, of_tile, matrix, column, first_step=first_step, rows_shared_by=shared_by, **scratch
            )

        uses = count_tiles(layout.used, column_tiles * tiles.splits) * steps
        if call.gathers:
            tell_of_last(call, uses, scratch["filled"])
        drain(uses, tiles.stages, scratch["emptied"])

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(to_compute, action="increase")
        plgpu.barrier_wait(scratch["added"])

        @each
        def _(first_stage: Any, row_tile: Any, column: Any, part: Any) -> None:
            group = layout.group_of(row_tile)
            if call.format:
                of_blocks = [ref.at[group] for ref in others[: 1 + call.zeros]]
                own = (call, H, steps, first_stage, of_blocks, column)
                if call.row_block:
                    row, _, _ = layout.place(row_tile, group)
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
            # Not before the sums, which leave no registers for it.
            row, first, last = layout.place(row_tile, group)
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
