"""The kernel for Blackwell: as `kernel` has it, by the fifth generation of tensor cores.

Matrices are always the first operand and rows the second, for that one takes 128 and this one any multiple of 16; sums are
in tensor memory. In each block one warp brings tiles to shared memory and one has them multiplied, and a warpgroup turns
sums into results while those of the next tile are under way: there is room for two tiles of sums.
It has not run on a GPU. Letters here, beside the common ones of docs/concepts/letters.md: G groups, H halves (gate
and up, or one), N and K of a matrix [N, K].
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT, map_tiles
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.blackwell_tiles import OUTPUTS, SLOTS, piece_rows
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
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import Tiles

_LOADING_WARP, _MULTIPLYING_WARP = 0, 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Facts of a call that are known when it is compiled.

    Attributes:
        tiles: sizes of the tiles.
        finish: function from the sums of the halves, float32, to the result.
        H: halves.
        biased: flag that biases are added before `finish`.
    """

    tiles: Tiles
    finish: Callable[..., jax.Array]
    H: int
    biased: bool


@partial(jax.jit, static_argnames=("tiles", "finish", "out_dtype", "blocks", "interpret"))
def multiply(
    rows_RK: jax.Array,
    matrices_GHNK: jax.Array,
    biases_GHN: jax.Array | None,
    group_sizes_G: jax.Array,
    tiles: Tiles,
    finish: Callable[..., jax.Array],
    out_dtype: jnp.dtype,
    *,
    blocks: int,
    interpret: bool,
) -> jax.Array:
    """finish(W[g, 0] x + b[g, 0], ...) of each row x, with g its group; rows that no group owns hold anything.

    R is a multiple of 8 here, and `blocks` the number of multiprocessors. Products of the same sizes and `finish` are one
    function of a program, so that its layers have the kernel made once.
    """
    R = rows_RK.shape[0]
    _, H, N, _ = matrices_GHNK.shape
    call = Call(tiles=tiles, finish=finish, H=H, biased=biases_GHN is not None)
    stored = [matrices_GHNK]
    if biases_GHN is not None:  # read without bounds, unlike what the accelerator copies
        stored.append(jnp.pad(biases_GHN, ((0, 0), (0, 0), (0, -N % OUTPUTS))))
    kernel = plgpu.kernel(
        partial(_kernel, call=call),
        out_type=jax.ShapeDtypeStruct((R, N), out_dtype),
        grid=(blocks,),
        grid_names=("multiprocessor",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=_scratch(call, rows_RK.dtype, out_dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    return kernel(*map_tiles(group_sizes_G, R, tiles.m), rows_RK[None], *stored)


def _scratch(call: Call, dtype: Any, out_dtype: Any) -> dict[str, Any]:
    tiles, H = call.tiles, call.H
    layout = swizzled(tiles.k, dtype)
    by_tensor_core = {"num_arrivals": 1, "orders_tensor_core": True}
    return {
        "row_tiles": plgpu.SMEM((tiles.stages, 1, tiles.m, tiles.k), dtype, transforms=layout),
        "matrix_tiles": plgpu.SMEM((tiles.stages, H, OUTPUTS, tiles.k), dtype, transforms=layout),
        "sums": plgpu.TMEM((OUTPUTS, SLOTS * H * tiles.m), jnp.float32),
        "results": plgpu.SMEM((SLOTS, piece_rows(tiles.m, H), OUTPUTS), out_dtype),
        "filled": plgpu.Barrier(num_arrivals=1 + H, num_barriers=tiles.stages),
        "emptied": plgpu.Barrier(num_barriers=tiles.stages, **by_tensor_core),
        "summed": plgpu.Barrier(num_barriers=SLOTS, **by_tensor_core),
        "taken": plgpu.Barrier(num_barriers=SLOTS, **by_tensor_core),
    }


def _kernel(*refs: Any, call: Call, **scratch: Any) -> None:
    groups, blocks, skips, sizes, used, rows, matrices, *biases, out = refs
    tiles = call.tiles
    steps, column_tiles = rows.shape[2] // tiles.k, pl.cdiv(matrices.shape[2], OUTPUTS)
    own_tiles = count_tiles(used[0], column_tiles)
    each = partial(each_tile, used[0], column_tiles, tiles.band)
    warpgroup = lax.axis_index("warpgroup")

    def load_all() -> None:
        @each
        def _(i: Any, row_tile: Any, column_tile: Any) -> None:
            tile_rows = rows.at[:, pl.ds(blocks[row_tile] * ALIGNMENT, tiles.m)]
            load(steps, i * steps, tile_rows, matrices.at[groups[row_tile]], column_tile * OUTPUTS, **scratch)

        drain(own_tiles * steps, tiles.stages, scratch["emptied"])

    def sum_all() -> None:
        each(lambda i, row_tile, column_tile: _sum(call, steps, i, **scratch))
        drain(own_tiles, SLOTS, scratch["taken"])

    @pl.when(warpgroup == 0)
    def _() -> None:
        @plgpu.warp_map
        def _(warp: Any) -> None:
            pl.when(warp == _LOADING_WARP)(load_all)
            pl.when(warp == _MULTIPLYING_WARP)(sum_all)

    @pl.when(warpgroup == 1)
    def _() -> None:
        @each
        def _(i: Any, row_tile: Any, column_tile: Any) -> None:
            group, row, column = groups[row_tile], blocks[row_tile] * ALIGNMENT, column_tile * OUTPUTS
            first, last = skips[row_tile], skips[row_tile] + sizes[row_tile]
            own_biases = [biases[0].at[group, h, pl.ds(column, OUTPUTS)] for h in range(call.H)] if biases else []
            _finish(call, i, own_biases, out, row, first, last, column, **scratch)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sums_of(call: Call, sums: Any, i: Any, h: int, first: int, count: int) -> Any:
    """Tensor memory that has, of the block's i-th tile and half h, the sums of rows from `first` on."""
    return sums.at[:, pl.ds((lax.rem(i, SLOTS) * call.H + h) * call.tiles.m + first, count)]


def _sum(
    call: Call,
    steps: int,
    i: Any,
    *,
    row_tiles: Any,
    matrix_tiles: Any,
    sums: Any,
    filled: Any,
    emptied: Any,
    summed: Any,
    taken: Any,
    **others: Any,
) -> None:
    """Have the block's i-th tile multiplied. A stage is given back by the tensor core, when it is through with it."""
    del others
    slot = lax.rem(i, SLOTS)

    @pl.when(i >= SLOTS)
    def _() -> None:
        plgpu.barrier_wait(taken.at[slot])

    def one(step: Any, nothing: Any) -> None:
        del nothing
        stage = lax.rem(i * steps + step, call.tiles.stages)
        plgpu.barrier_wait(filled.at[stage])
        for h in range(call.H):
            own_sums = _sums_of(call, sums, i, h, 0, call.tiles.m)
            plgpu.tcgen05_mma(own_sums, matrix_tiles.at[stage, h], row_tiles.at[stage, 0].T, accumulate=step > 0)
        plgpu.tcgen05_commit_arrive(emptied.at[stage])

    lax.fori_loop(0, steps, one, None)
    plgpu.tcgen05_commit_arrive(summed.at[slot])


def _finish(
    call: Call,
    i: Any,
    biases: list[Any],
    out: Any,
    row: Any,
    first: Any,
    last: Any,
    column: Any,
    *,
    sums: Any,
    results: Any,
    summed: Any,
    taken: Any,
    **others: Any,
) -> None:
    """Turn the sums of the block's i-th tile into results, a piece of its rows after the other, and copy them out.

    `first` and `last` are its group's own rows, of a tile that begins at `row`.
    """
    del others
    slot, count = lax.rem(i, SLOTS), results.shape[1]
    # Read before the wait, for they come from far.
    values = [plgpu.load(bias, optimized=False).astype(jnp.float32) for bias in biases]
    plgpu.barrier_wait(summed.at[slot])
    pieces = call.tiles.m // count
    for piece in range(pieces):
        start = piece * count
        own = [_sums_of(call, sums, i, h, start, count) for h in range(call.H)]
        halves = [plgpu.async_load_tmem(ref, layout=plgpu.Layout.TCGEN05) for ref in own]
        if piece == pieces - 1:
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(taken.at[slot])
        if call.biased:
            halves = [y + lax.broadcast_in_dim(b, y.shape, (0,)) for y, b in zip(halves, values, strict=True)]
        result = call.finish(*halves).astype(out.dtype)
        # Neighbors along the rows of a tile change hands, for registers are stored in pairs.
        transposed = plgpu.layout_cast(result, plgpu.Layout.TCGEN05_TRANSPOSED)
        shared = results.at[lax.rem(i * pieces + piece, SLOTS)]
        plgpu.wait_smem_to_gmem(SLOTS - 1, wait_read_only=True)
        write(shared.T, transposed)
        plgpu.commit_smem()
        copy_rows_out(shared, out, row + start, first - start, last - start, column)
