"""Rows that the kernel for Hopper gathers on their way to shared memory.

The tensor memory accelerator gathers rows on Blackwell alone, and Pallas has ``cp.async`` for GPUs before Hopper alone. So
the threads of the loading warpgroup copy 16 bytes each by that instruction, to where the accelerator would have put them.
A stage's rows are there when every thread has waited for its own copies, so whoever multiplies hears of them from the
loader, which asks for the rows of some stages more before it waits. Matrices come by the accelerator as ever.

Letters here, beside the common ones of docs/concepts/letters.md: H halves (gate and up, or one).
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu
from jax.experimental.mosaic.gpu import utils as gpu_utils

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.pipeline import copy_matrices, plgpu, swizzled, wait_for_place
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.sums import Call

# Like Pallas's own, their types are still moving. The second has the dialects that it makes operations of.
mgpu: Any = gpu
utils: Any = gpu_utils
# Bytes that a thread copies at a time, the threads of a warpgroup, and the copies whose rows are looked up together.
_COPIED_BYTES, _THREADS, _TOGETHER = 16, 128, 4


def stages_ahead(stages: int) -> int:
    """Stages that rows are asked for before the first of them is waited for.

    A stage is given back when the products of the next are under way, which thus has to be told of before.
    """
    return max(stages - 2, 0)


def load_gathered(
    call: Call,
    steps: int,
    first_stage: Any,
    rows: Any,
    index: Any,
    first_place: Any,
    matrix: Any,
    column: Any,
    *,
    first_step: Any,
    row_tiles: Any,
    matrix_tiles: Any,
    filled: Any,
    emptied: Any,
    **others: Any,
) -> None:
    """The same as `pipeline.load`, of rows that lie anywhere; `tell_of_last` has to follow the last tile.

    Args:
        call: facts of the call.
        steps: stages of the tile.
        first_stage: first stage of the tile, counted from the block's first.
        rows: all rows, [parts, T, inner numbers of a part].
        index: int32 [R], the row at each place; a tile may go on beyond the last.
        first_place: first place of the tile.
        matrix: matrix of its group, [H, N, inner numbers of a part].
        column: first output of the tile.
        first_step: stages of the whole inner dimension before those of the tile.
        row_tiles: place of the rows in shared memory.
        matrix_tiles: place of the matrices there.
        filled: barriers of the stages, with one arrival for all parts of the rows.
        emptied: barriers of the stages, which whoever multiplies arrives at.
        others: scratch that loading has nothing to do with.
    """
    del others
    stages, parts, _, width = row_tiles.shape
    copy = _copy_in_interpreter if call.interpret else partial(_copy, call.row_width)
    ahead = stages_ahead(stages)

    def one(step: Any, nothing: Any) -> None:
        del nothing
        stage = first_stage + step
        slot = wait_for_place(stage, stages, emptied)
        inner = (first_step + step) * width
        copy_matrices(matrix, column, pl.ds(inner, width), matrix_tiles.at[slot], filled.at[slot])
        for part in range(parts):
            copy(rows.at[part], index, first_place, inner, row_tiles.at[slot, part])
        _wait_for_copies(call, ahead, commit=True)

        @pl.when(stage >= ahead)
        def _() -> None:
            _tell(filled, stage - ahead)

    lax.fori_loop(0, steps, one, None)


def tell_of_last(call: Call, uses: Any, filled: Any) -> None:
    """Wait for the rows of the last of so many stages, and tell of those that nobody was told of yet."""
    _wait_for_copies(call, 0, commit=False)
    pending = jnp.minimum(uses, stages_ahead(call.tiles.stages))

    def one(i: Any, nothing: Any) -> None:
        del nothing
        _tell(filled, uses - pending + i)

    lax.fori_loop(0, pending, one, None)


def _tell(filled: Any, stage: Any) -> None:
    # Tensor cores read what threads wrote only behind a fence; behind it all threads meet, each done with its copies.
    plgpu.commit_smem()
    plgpu.barrier_arrive(filled.at[lax.rem(stage, filled.shape[0])])


def place_of(row: Any, chunk: Any, row_bytes: int, swizzle: int) -> Any:
    """Byte of a tile in shared memory at which 16 bytes of a row lie, as the accelerator writes them.

    Blocks of 8 rows and one swizzle of bytes follow one another, along a row first. In each, bits 4 and up of an address
    change with those from bit 7 on (CUDA C++ Programming Guide, "Tensor Memory Access", on swizzling).

    Args:
        row: row of the tile.
        chunk: number of the 16 bytes in the row.
        row_bytes: bytes of a row of the tile.
        swizzle: bytes of a swizzle: 32, 64 or 128.

    >>> [place_of(row, 1, 128, 128) for row in (0, 1, 2, 8)]
    [16, 128, 304, 1040]
    """
    chunks = swizzle // _COPIED_BYTES
    block = row // ALIGNMENT * (row_bytes // swizzle) + chunk // chunks
    plain = (block * ALIGNMENT + row % ALIGNMENT) * swizzle + chunk % chunks * _COPIED_BYTES
    return plain ^ (plain // 8 & (swizzle - _COPIED_BYTES))


def _copy_in_interpreter(rows: Any, index: Any, first_place: Any, inner: Any, tile: Any) -> None:
    (m, width), last = tile.shape, index.shape[0] - 1
    places = jnp.minimum(first_place + jnp.arange(m, dtype=jnp.int32), last)
    tile[...] = rows[:, pl.ds(inner, width)][index[...][places]]


def _copy(row_width: int, rows: Any, index: Any, first_place: Any, inner: Any, tile: Any) -> None:
    """Ask for a tile's rows, numbers from `inner` on, of its places from the first on; nothing is waited for."""
    (m, width), (T, pitch), itemsize = tile.shape, rows.shape, jnp.dtype(tile.dtype).itemsize
    last = index.shape[0] - 1
    row_bytes = width * itemsize
    chunks = row_bytes // _COPIED_BYTES
    swizzle = plgpu.find_swizzle(row_width * itemsize * 8)

    @plgpu.inline_mgpu(
        arg_types=(
            plgpu.RefType(),
            plgpu.RefType(),
            plgpu.Layout.WG_SPLAT,
            plgpu.Layout.WG_SPLAT,
            plgpu.RefType(swizzled(row_width, tile.dtype)),
        )
    )
    def ask(context: Any, rows: Any, index: Any, first_place: Any, inner: Any, tile: Any) -> None:
        del context
        arith, llvm, nvvm = utils.arith, utils.llvm, utils.nvvm
        i8, i32, i64 = map(utils.ir.IntegerType.get_signless, (8, 32, 64))
        in_global = llvm.PointerType.get(address_space=1)

        def number(value: Any) -> Any:
            return mgpu.FragmentedArray.splat(value, (), is_signed=False)

        def at(pointer: Any, offset: Any, of: Any) -> Any:
            return utils.getelementptr(pointer, [offset], of)

        numbers = llvm.addrspacecast(in_global, utils.memref_ptr(rows))
        rows_of_places = llvm.addrspacecast(in_global, utils.memref_ptr(index))
        there = utils.memref_ptr(tile)
        thread = number(arith.remui(mgpu.thread_idx(), mgpu.c(_THREADS, i32)))
        chunk, own = thread % chunks, thread // chunks
        column, first_place = (number(value.registers.item()) for value in (inner, first_place))
        column = (column * itemsize + chunk * _COPIED_BYTES).registers.item()
        numbers = at(numbers, arith.extui(i64, column), i8)
        together = _THREADS // chunks  # rows, and a multiple of 8 of them: all in the same place of a swizzle
        to = place_of(own, chunk, row_bytes, swizzle).registers.item()
        there = at(there, to, i8)
        whole = m // (_TOGETHER * together)

        def ask_for(first: Any, places: range) -> None:
            """Ask for rows of places that this thread has, behind the first of them."""
            for place in places:
                known = (first_place + own + first + place).min(number(mgpu.c(last, i32))).registers.item()
                row = number(llvm.load(i32, at(rows_of_places, known, i32)))
                # An index that is out of range reads another row, and not what is no row at all.
                row = row.min(number(mgpu.c(T - 1, i32))).registers.item()
                start = arith.muli(arith.extui(i64, row), mgpu.c(pitch * itemsize, i64))
                to = at(there, (first * row_bytes).registers.item(), i8)
                nvvm.cp_async_shared_global(
                    at(to, place * row_bytes, i8), at(numbers, start, i8), _COPIED_BYTES, nvvm.LoadCacheModifierKind.CG
                )

        @utils.fori(mgpu.c(whole, i32), [])
        def _(i: Any, carry: Any) -> Any:
            ask_for(number(i) * (_TOGETHER * together), range(0, _TOGETHER * together, together))
            return carry

        rest = whole * _TOGETHER * together
        for first in range(rest, m, together):
            here = number(mgpu.c(first, i32))
            if first + together <= m:
                ask_for(here, range(1))
            else:
                with mgpu.when((own + first < m).registers.item()):
                    ask_for(here, range(1))

    ask(rows, index, first_place, inner, tile)


def _wait_for_copies(call: Call, ahead: int, *, commit: bool) -> None:
    """Make the copies that this thread asked for last a group, if `commit`, and wait for all groups but the last ones."""
    if call.interpret:
        return

    @plgpu.inline_mgpu()
    def wait(context: Any) -> None:
        del context
        if commit:
            utils.nvvm.cp_async_commit_group()
        utils.nvvm.cp_async_wait_group(ahead)

    wait()
