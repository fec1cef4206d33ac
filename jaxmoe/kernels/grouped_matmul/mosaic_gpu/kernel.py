"""The kernel for Hopper: products of tiles of rows with the matrices of their groups, and what follows them.

A persistent grid over the multiprocessors, and in each block three warpgroups: one keeps bringing tiles of rows and of
matrices to shared memory, by the tensor memory accelerator; two multiply them by wgmma. The loader runs ahead over the ends
of tiles, so that the next is there when a result is written. Letters here, beside the common ones of
docs/concepts/letters.md: G groups, H halves (gate and up, or one), N and K of a matrix [N, K], I row tiles, c chunks of a
stage that share a scale.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT, GroupTiles
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.packed import EXPAND, scale_number, zero_number
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
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import WARPGROUPS, WGMMA_ROWS, Tiles
from jaxmoe.kernels.grouped_matmul.quantized import QuantizedStack

# Blocks of the grid: with fewer multiprocessors than an H100 or H200 has, some work longer.
MULTIPROCESSORS = GPUS["h100"].multiprocessors
# Registers of a thread that loads, and of one that multiplies.
_LOADER_REGISTERS, _COMPUTE_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Facts of a call that are known when it is compiled.

    Attributes:
        tiles: sizes of the tiles.
        finish: function from the sums of the halves, float32, to the result; differentiable or not.
        format: format of packed matrices, see `QuantizedStack`; None of others.
        block: outputs and inputs that share a scale, of packed matrices.
        zeros: flag that packed matrices have zero points of their own.
        biased: flag that biases are added before `finish`.
        interpret: flag that it runs in the interpreter, which multiplies from shared memory only.
    """

    tiles: Tiles
    finish: Callable[..., jax.Array]
    format: str | None
    block: tuple[int, int] | None
    zeros: bool
    biased: bool
    interpret: bool

    @property
    def parts(self) -> int:
        """Numbers of a matrix that share a byte; rows come in as many parts."""
        return 1 if self.format in (None, "float8_e4m3fn") else 2

    @property
    def own_shape(self) -> tuple[int, int]:
        """The part of a tile's sums that one warpgroup has."""
        m, n = self.tiles.m, self.tiles.n
        return (n // WARPGROUPS, m) if self.tiles.swapped else (m // WARPGROUPS, n)

    @property
    def chunk(self) -> int:
        """Inner numbers of a stage that share a scale, of packed matrices."""
        assert self.block is not None
        return min(self.tiles.k, self.block[1])


def multiply(
    rows_RK: jax.Array,
    matrices_GHNK: jax.Array | QuantizedStack,
    biases_GHN: jax.Array | None,
    layout: GroupTiles,
    tiles: Tiles,
    finish: Callable[..., jax.Array],
    out_dtype: jnp.dtype,
    *,
    interpret: bool,
) -> jax.Array:
    """finish(W[g, 0] x + b[g, 0], ...) of each row x, with g its group; rows that no group owns hold anything.

    R is a multiple of 8 here.
    """
    R, K = rows_RK.shape
    packed = matrices_GHNK if isinstance(matrices_GHNK, QuantizedStack) else None
    call = Call(
        tiles=tiles,
        finish=finish,
        format=packed.format if packed else None,
        block=packed.block if packed else None,
        zeros=packed is not None and packed.zero_points is not None,
        biased=biases_GHN is not None,
        interpret=interpret,
    )
    _, H, N, _ = matrices_GHNK.shape
    # Values, scales and zero points of what is packed.
    stored: list[Any] = jax.tree.leaves(matrices_GHNK)
    rows = jnp.moveaxis(rows_RK.reshape(R, K // call.parts, call.parts), -1, 0)
    if biases_GHN is not None:  # read without bounds, unlike what the accelerator copies
        stored.append(jnp.pad(biases_GHN, ((0, 0), (0, 0), (0, -N % tiles.n))))
    kernel = plgpu.kernel(
        partial(_kernel, call=call),
        out_type=jax.ShapeDtypeStruct((R, N), out_dtype),
        grid=(2 if interpret else MULTIPROCESSORS,),
        grid_names=("multiprocessor",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=_scratch(call, H, rows.dtype, stored[0].dtype, out_dtype),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    return kernel(*layout, rows, *stored)


def _scratch(call: Call, H: int, row_dtype: Any, matrix_dtype: Any, out_dtype: Any) -> dict[str, Any]:
    tiles, parts = call.tiles, call.parts
    row_width = (call.chunk if call.format else tiles.k) // parts
    # The interpreter reads no swizzled tile into registers.
    matrix_layout = () if call.interpret and call.format else swizzled(tiles.k // parts, matrix_dtype)
    scratch = {
        "row_tiles": plgpu.SMEM(
            (tiles.stages, parts, tiles.m, tiles.k // parts), row_dtype, transforms=swizzled(row_width, row_dtype)
        ),
        "matrix_tiles": plgpu.SMEM(
            (tiles.stages, H, tiles.n, tiles.k // parts), matrix_dtype, transforms=matrix_layout
        ),
        "results": plgpu.SMEM((WARPGROUPS, *(call.own_shape[::-1] if tiles.swapped else call.own_shape)), out_dtype),
        "filled": plgpu.Barrier(num_arrivals=parts + H, num_barriers=tiles.stages),
        "emptied": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
    }
    if call.interpret and call.format:
        scratch["expanded"] = plgpu.SMEM((WARPGROUPS, parts, WGMMA_ROWS, row_width), jnp.bfloat16)
    return scratch


def _kernel(*refs: Any, call: Call, **scratch: Any) -> None:
    groups, blocks, skips, sizes, used, rows, matrices, *others, out = refs
    tiles = call.tiles
    H, N = matrices.shape[1:3]
    steps, column_tiles = rows.shape[2] * call.parts // tiles.k, pl.cdiv(N, tiles.n)

    def each(body: Callable[[Any, Any, Any], None]) -> None:
        """body(number of the first stage, row tile, first output) for this block's tiles."""
        each_tile(used[0], column_tiles, tiles.band, lambda i, row, column: body(i * steps, row, column * tiles.n))

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(_LOADER_REGISTERS, action="decrease")

        @each
        def _(first_stage: Any, row_tile: Any, column: Any) -> None:
            row = blocks[row_tile] * ALIGNMENT
            matrix = matrices.at[groups[row_tile]]
            load(steps, first_stage, rows.at[:, pl.ds(row, tiles.m)], matrix, column, **scratch)

        drain(count_tiles(used[0], column_tiles) * steps, tiles.stages, scratch["emptied"])

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")

        @each
        def _(first_stage: Any, row_tile: Any, column: Any) -> None:
            group, row = groups[row_tile], blocks[row_tile] * ALIGNMENT
            first, last = skips[row_tile], skips[row_tile] + sizes[row_tile]
            if call.format:
                of_blocks = [ref.at[group] for ref in others[: 1 + call.zeros]]
                sums = _sum_packed(call, H, steps, first_stage, of_blocks, column, **scratch)
            else:
                sums = _sum(call, H, steps, first_stage, **scratch)
            if call.biased:
                sums = [_add_bias(call, y, others[-1].at[group, h], column) for h, y in enumerate(sums)]
            result = call.finish(*sums).astype(out.dtype)
            _store(call, result, scratch["results"], out, row, first, last, column)

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sum(call: Call, H: int, steps: int, first_stage: Any, **scratch: Any) -> list[jax.Array]:
    """The sums of this warpgroup's part of a tile. A stage is given back when the products of the next are under way."""
    tiles, own = call.tiles, _own(call)

    def accumulate(*sums: Any) -> list[jax.Array]:
        def one(step: Any, nothing: Any) -> None:
            del nothing
            stage = first_stage + step
            slot = lax.rem(stage, tiles.stages)
            plgpu.barrier_wait(scratch["filled"].at[slot])
            rows = scratch["row_tiles"].at[slot, 0]
            for h, sum_ref in enumerate(sums):
                matrix = scratch["matrix_tiles"].at[slot, h]
                if tiles.swapped:
                    plgpu.wgmma(sum_ref, matrix.at[own], rows.T)
                else:
                    plgpu.wgmma(sum_ref, rows.at[own], matrix.T)
            plgpu.wgmma_wait(H)

            @pl.when(step > 0)
            def _() -> None:
                plgpu.barrier_arrive(scratch["emptied"].at[lax.rem(stage - 1, tiles.stages)])

        lax.fori_loop(0, steps, one, None)
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(scratch["emptied"].at[lax.rem(first_stage + steps - 1, tiles.stages)])
        return [sum_ref[...] for sum_ref in sums]

    return pl.run_scoped(accumulate, *[plgpu.ACC(call.own_shape, jnp.float32) for _ in range(H)])


def _sum_packed(
    call: Call, H: int, steps: int, first_stage: Any, of_blocks: list[Any], column: Any, **scratch: Any
) -> list[jax.Array]:
    """The same of packed matrices: sums over inputs that share a scale are scaled in float32 and then added up.

    Expanded numbers have few digits, zero points taken off or not, so nothing is rounded before the sums. `of_blocks` are
    scales and, if any, zero points.
    """
    scales, *zeros = of_blocks
    tiles, shape, chunk = call.tiles, call.own_shape, call.chunk
    assert call.format is not None
    assert call.block is not None
    expand, (bn, bk) = EXPAND[call.format], call.block
    own, warpgroup = _own(call), lax.axis_index("warpgroup")
    # Where the last tile sticks out, a warpgroup may have no outputs at all; what it reads instead is not stored.
    first_output = jnp.minimum(column + warpgroup * WGMMA_ROWS, scales.shape[1] * bn - WGMMA_ROWS)
    width = chunk // call.parts

    def of_block(ref: Any, decode: Callable[[jax.Array], jax.Array], columns: int, h: int, inner: Any) -> jax.Array:
        """A block's number; where each output has its own, as an array of so many columns."""
        if bn > 1:
            return decode(ref[h, lax.div(first_output, bn), inner])
        outputs = plgpu.load(ref.at[h, pl.ds(first_output, WGMMA_ROWS), inner], optimized=False)
        return lax.broadcast_in_dim(decode(outputs), (WGMMA_ROWS, columns), (0,))

    def one(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = lax.rem(first_stage + step, tiles.stages)
        chunks = range(tiles.k // chunk)
        # Read before the wait, for they come from far.
        blocks = [[(h, lax.div(step * tiles.k + c * chunk, bk)) for c in chunks] for h in range(H)]
        scale_Hc = [[of_block(scales, scale_number, tiles.m, *at) for at in of_half] for of_half in blocks]
        zero_Hc = [[of_block(zeros[0], zero_number, width, *at) for at in of_half] for of_half in blocks if zeros]
        plgpu.barrier_wait(scratch["filled"].at[slot])
        scaled = list(sums)
        for h in range(H):
            expanded = expand(scratch["matrix_tiles"][slot, h, own])
            for c in chunks:
                inner = slice(c * width, (c + 1) * width)
                matrices = [matrix[:, inner] for matrix in expanded] if len(chunks) > 1 else expanded
                if zeros:
                    matrices = [matrix - zero_Hc[h][c] for matrix in matrices]

                def product(sum_ref: Any, matrices: Sequence[jax.Array] = matrices, inner: slice = inner) -> jax.Array:
                    for part, matrix in enumerate(matrices):
                        first = _first_operand(call, scratch, part, matrix)
                        plgpu.wgmma(sum_ref, first, scratch["row_tiles"].at[slot, part, :, inner].T)
                    plgpu.wgmma_wait(0)
                    return sum_ref[...]

                scaled[h] += scale_Hc[h][c] * pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        plgpu.barrier_arrive(scratch["emptied"].at[slot])
        return tuple(scaled)

    return list(lax.fori_loop(0, steps, one, tuple(jnp.zeros(shape, jnp.float32) for _ in range(H))))


def _first_operand(call: Call, scratch: dict[str, Any], part: int, matrix: jax.Array) -> Any:
    """A part of an expanded tile for wgmma: registers; in the interpreter, which takes none, shared memory."""
    if not call.interpret:
        return matrix
    staged = scratch["expanded"].at[lax.axis_index("warpgroup"), part]
    staged[...] = matrix
    return staged


def _own(call: Call) -> Any:
    """The part of its operand that is this warpgroup's."""
    height = call.own_shape[0]
    return pl.ds(pl.multiple_of(lax.axis_index("warpgroup") * height, height), height)


def _add_bias(call: Call, sums: jax.Array, bias: Any, column: Any) -> jax.Array:
    outputs, dim = (call.own_shape[0], 0) if call.tiles.swapped else (call.own_shape[1], 1)
    first = column + lax.axis_index("warpgroup") * outputs if call.tiles.swapped else column
    values = plgpu.load(bias.at[pl.ds(first, outputs)], optimized=False).astype(jnp.float32)
    return sums + lax.broadcast_in_dim(values, call.own_shape, (dim,))


def _store(call: Call, result: jax.Array, results: Any, out: Any, row: Any, first: Any, last: Any, column: Any) -> None:
    """Write the rows from `first` to `last` of a tile that begins at `row`."""
    warpgroup, height = lax.axis_index("warpgroup"), call.own_shape[0]
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    if call.tiles.swapped:
        # Neighbors along the rows of a tile change hands, for registers are stored in pairs.
        transposed = plgpu.layout_cast(result, plgpu.Layout.WGMMA_TRANSPOSED)
        write(results.at[warpgroup].T, transposed)
        above, column = jnp.int32(0), column + warpgroup * height
    else:
        write(results.at[warpgroup], result)
        above = warpgroup * height
    plgpu.commit_smem()
    copy_rows_out(results.at[warpgroup], out, row + above, first - above, last - above, column)
