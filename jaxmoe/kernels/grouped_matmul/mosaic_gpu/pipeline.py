"""Steps that the kernels of both generations share: a block's tiles, their way to shared memory, and that of results out.

Letters here, beside the common ones of docs/concepts/letters.md: H halves (gate and up, or one), I row tiles.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT

# Its types are still moving, and a checker would hold them against us.
plgpu: Any = mosaic_gpu


def compiler_params(*, own_barriers: bool, approximate: bool = False) -> Any:
    """Pallas's options for a kernel for Hopper; with `own_barriers` it puts no barriers of a warpgroup beside the kernel's.

    It would put one before every copy to shared memory, and one before and one behind every store of registers to it.
    A kernel needs none of these where each part of shared memory is one of the following.

    - Stages are written by copies and read by tensor cores or to registers. Whoever issues a copy has waited for `emptied`,
      at which every thread that reads arrives when it is through, behind a fence if it has read to registers. No thread of
      the loader gets ahead by a whole round: all 128 arrive at `filled`, before which nobody empties. Where its threads
      copy rows themselves, they do so behind a fence and a barrier, `commit_smem`.
    - Results are written by threads and read by copies. `wait_smem_to_gmem` ends with a barrier, so all threads store
      behind the copies before, and `commit_smem` is a fence and a barrier, so they are copied behind all threads' stores.
    - Numbers alone, as offsets of groups are, are stored without barriers in any case. Every thread of the loader stores
      all of them, and others read them behind an arrival of each of those threads.

    Rows of a stage that are masked in place are none of these: they are read and written by threads.
    """
    return plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        approx_math=approximate,
        unsafe_no_auto_barriers=own_barriers,
    )


def count_tiles(row_tiles: Any, column_tiles: int) -> Any:
    """Tiles that are this block's: every so many-th, by the number of blocks."""
    here, everywhere = lax.axis_index("multiprocessor"), lax.axis_size("multiprocessor")
    return lax.div(row_tiles * column_tiles - here + everywhere - 1, everywhere)


def each_tile(row_tiles: Any, column_tiles: int, band: int, body: Callable[[Any, Any, Any], None]) -> None:
    """body(number among this block's, row tile, column tile) for this block's tiles."""
    here, everywhere = lax.axis_index("multiprocessor"), lax.axis_size("multiprocessor")

    def one(i: Any, nothing: Any) -> None:
        del nothing
        body(i, *place(here + i * everywhere, row_tiles, column_tiles, band))

    lax.fori_loop(0, count_tiles(row_tiles, column_tiles), one, None)


def place(number: Any, row_tiles: Any, column_tiles: int, band: int) -> tuple[Any, Any]:
    """Row and column tile of a number: down the row tiles of a band, then on to the next columns, then the next band."""
    first = lax.div(number, band * column_tiles) * band
    height = jnp.minimum(row_tiles - first, band)
    inside = number - first * column_tiles
    return first + lax.rem(inside, height), lax.div(inside, height)


def load(
    steps: int,
    first_stage: Any,
    rows: Any,
    matrix: Any,
    column: Any,
    *,
    first_step: Any = 0,
    rows_shared_by: str | None = None,
    row_tiles: Any,
    matrix_tiles: Any,
    filled: Any,
    emptied: Any,
    **others: Any,
) -> None:
    """Bring the stages of one tile to shared memory, each as soon as its place has been emptied.

    Args:
        steps: stages of the tile.
        first_stage: first stage of the tile, counted from the block's first.
        rows: rows of the tile, [parts, m, inner numbers of a part]; see `packed` for more than one part.
        matrix: matrix of its group, [H, N, inner numbers of a part].
        column: first output of the tile.
        first_step: stages of the whole inner dimension before those of the tile.
        rows_shared_by: axis of a cluster whose blocks have the same rows at the same time, see `kernel`: each reads its part
            of them and writes it to all of them. None where each block reads its own.
        row_tiles: place of the rows in shared memory, [stages, parts, m, k of a part].
        matrix_tiles: place of the matrices there, [stages, H, n, k of a part].
        filled: barriers of the stages, which the copies arrive at.
        emptied: barriers of the stages, which whoever multiplies arrives at.
        others: scratch that loading has nothing to do with.
    """
    del others
    stages, parts, _, width = row_tiles.shape

    def one(step: Any, nothing: Any) -> None:
        del nothing
        slot = wait_for_place(first_stage + step, stages, emptied)
        inner = pl.ds((first_step + step) * width, width)
        for part in range(parts):
            plgpu.copy_gmem_to_smem(
                rows.at[part, :, inner], row_tiles.at[slot, part], filled.at[slot], collective_axes=rows_shared_by
            )
        copy_matrices(matrix, column, inner, matrix_tiles.at[slot], filled.at[slot])

    lax.fori_loop(0, steps, one, None)


def wait_for_place(stage: Any, stages: int, emptied: Any) -> Any:
    """Give the place of a stage in shared memory, as soon as the stage that was there before it has been multiplied."""
    slot = lax.rem(stage, stages)

    @pl.when(stage >= stages)
    def _() -> None:
        plgpu.barrier_wait(emptied.at[slot])

    return slot


def copy_matrices(matrix: Any, column: Any, inner: Any, tile: Any, filled: Any) -> None:
    """Ask for a stage of a matrix's halves, [H, n, k of a part] from output `column` on; `filled` is told of each."""
    halves, n, _ = tile.shape
    for h in range(halves):
        plgpu.copy_gmem_to_smem(matrix.at[h, pl.ds(column, n), inner], tile.at[h], filled)


def drain(uses: Any, slots: int, barriers: Any) -> None:
    """Wait for the last use of each slot to end, so that no barrier is left with an arrival that nobody saw."""
    pending = jnp.minimum(uses, slots)

    def one(i: Any, nothing: Any) -> None:
        del nothing
        plgpu.barrier_wait(barriers.at[lax.rem(uses - pending + i, slots)])

    lax.fori_loop(0, pending, one, None)


def copy_rows_out(results: Any, out: Any, row: Any, first: Any, last: Any, column: Any) -> None:
    """Copy the rows from `first` to `last` of results in shared memory, which begin at [row, column] of `out`; no wait.

    A copy has a static number of rows, so the number wanted is made up of powers of two. Outputs beyond the matrix are
    left out by the accelerator, but not where it copies a single row, or rows as wide as the matrix: that is made one run
    of bytes, which would go on into the next row. `column` is a multiple of the results' width, and may be beyond the
    matrix; or the results end within it. All of it is one group to `wait_smem_to_gmem`.
    """
    (height, width), N = results.shape, out.shape[1]
    start = jnp.clip(first, 0, height)
    count = jnp.clip(last, 0, height) - start

    def copy(when: Any, start: Any, rows: int, outputs: int) -> None:
        @pl.when((count & rows != 0) & when)
        def _() -> None:
            source = results.at[pl.ds(start, rows), pl.ds(0, outputs)]
            target = out.at[pl.ds(row + start, rows), pl.ds(column, outputs)]
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    rows = 1 << (height.bit_length() - 1)
    while rows > 1:
        copy(column < N, start, rows, width)
        start += count & rows
        rows //= 2
    copy(column + width <= N, start, 1, width)
    if N % width:
        copy((column < N) & (column + width > N), start, 1, N % width)
    plgpu.commit_smem_to_gmem_group()


def write(shared: Any, value: jax.Array, *, optimized: bool = False) -> None:
    """Store to shared memory; jax since 0.12 wants to be told where it is not swizzled, so not free of bank conflicts."""
    if hasattr(plgpu, "store"):
        plgpu.store(shared, value, optimized=optimized)
    else:
        shared[...] = value


def swizzled(width: int, dtype: Any, rows: int = ALIGNMENT) -> tuple[Any, ...]:
    """The layout in shared memory that the accelerator writes and tensor cores read without bank conflicts.

    A slice of such an array begins at a multiple of `rows`, which may be 1 where an array is one swizzle wide. That is the
    same layout: which 16 bytes change places with which follows from the address, for the accelerator as for whoever
    stores (CUDA C++ Programming Guide, "Tensor Memory Access", on the offset of the pattern).
    """
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    return plgpu.TilingTransform((rows, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
