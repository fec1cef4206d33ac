"""Sums of a tile's products on Hopper, as one of the two warpgroups that multiply computes them.

Letters here, beside the common ones of docs/concepts/letters.md: H halves (gate and up, or one), c chunks of a stage that
share a scale.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxmoe.kernels.grouped_matmul.mosaic_gpu.packed import EXPAND, Expand, scale_number, zero_number
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.pipeline import plgpu
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import WARPGROUPS, WGMMA_ROWS, Tiles
from jaxmoe.kernels.grouped_matmul.quantized import FORMATS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """Facts of a call that are known when it is compiled.

    Attributes:
        tiles: sizes of the tiles.
        K: inner dimension.
        finish: function from the sums of the halves, float32, to the result; differentiable or not.
        format: format of packed matrices, see `QuantizedStack`; None of others.
        block: outputs and inputs that share a scale, of packed matrices.
        zeros: flag that packed matrices have zero points of their own.
        matrix_scaled: flag that packed matrices have scales of their own, beside those of their blocks.
        scales_numbers: flag that numbers of packed matrices are scaled before they are multiplied, and not sums of them.
        row_block: inner numbers of a row that share a scale, of quantized rows; None of others.
        biased: flag that biases are added before `finish`.
        gathers: flag that the kernel gathers the rows, see `gather`.
        interpret: flag that it runs in the interpreter, which multiplies from shared memory only.
    """

    tiles: Tiles
    K: int
    finish: Callable[..., jax.Array]
    format: str | None
    block: tuple[int, int] | None
    zeros: bool
    matrix_scaled: bool
    scales_numbers: bool
    row_block: int | None
    biased: bool
    gathers: bool
    interpret: bool

    @property
    def parts(self) -> int:
        """Numbers of a matrix that share a byte; rows come in as many parts."""
        return 1 if self.format is None else FORMATS[self.format].per_byte

    @property
    def expands(self) -> bool:
        """Whether matrices are expanded in registers, where wgmma takes them from."""
        return self.format is not None and self.row_block is None

    @property
    def expand(self) -> Expand:
        """The function that expands numbers of packed matrices."""
        assert self.format is not None
        return EXPAND[self.format]

    @property
    def own_shape(self) -> tuple[int, int]:
        """The part of a tile's sums that one warpgroup has."""
        m, n = self.tiles.m, self.tiles.n
        return (n // WARPGROUPS, m) if self.tiles.swapped else (m // WARPGROUPS, n)

    @property
    def row_width(self) -> int:
        """Inner numbers of a stage's rows that lie together in shared memory, see `swizzled`: they divide a row."""
        return math.gcd(self.chunk if self.format else self.tiles.k, self.K) // self.parts

    @property
    def chunk(self) -> int:
        """Inner numbers of a stage that are multiplied at a time, of packed matrices."""
        assert self.block is not None
        return self.tiles.k if self.scales_numbers else min(self.tiles.k, self.block[1])


def sum_tile(call: Call, H: int, steps: int, first_stage: Any, **scratch: Any) -> list[jax.Array]:
    """The sums of this warpgroup's part of a tile. A stage is given back when the products of the next are under way."""
    tiles, own = call.tiles, own_part(call)

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


def sum_packed(
    call: Call, H: int, steps: int, first_stage: Any, of_blocks: list[Any], column: Any, **scratch: Any
) -> list[jax.Array]:
    """The same of packed matrices: sums over inputs that share a scale are scaled in float32 and then added up.

    Expanded numbers have few digits, zero points taken off or not, so nothing is rounded before the sums. `of_blocks` are
    scales and, if any, zero points.
    """
    tiles, shape, width = call.tiles, call.own_shape, call.chunk // call.parts
    read_scale, read_zero = _readers(call, of_blocks, column, tiles.m, width)
    own = own_part(call)

    def one(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = lax.rem(first_stage + step, tiles.stages)
        # Read before the wait, for they come from far.
        blocks = _blocks(call, step)
        scale_Hc = [[read_scale(h, block) for block in blocks] for h in range(H)]
        zero_Hc = [[read_zero(h, block) for block in blocks] for h in range(H) if read_zero]
        plgpu.barrier_wait(scratch["filled"].at[slot])
        scaled = list(sums)
        for h in range(H):
            expanded = call.expand(scratch["matrix_tiles"][slot, h, own])
            for c in range(len(blocks)):
                inner = slice(c * width, (c + 1) * width)
                matrices = [matrix[:, inner] for matrix in expanded] if len(blocks) > 1 else expanded
                if read_zero:
                    matrices = [matrix - zero_Hc[h][c] for matrix in matrices]

                def product(sum_ref: Any, matrices: Sequence[jax.Array] = matrices, inner: slice = inner) -> jax.Array:
                    for part, matrix in enumerate(matrices):
                        first = _first_operand(call, scratch, part, matrix)
                        plgpu.wgmma(sum_ref, first, scratch["row_tiles"].at[slot, part, :, inner].T)
                    plgpu.wgmma_wait(0)
                    return sum_ref[...]

                scaled[h] += scale_Hc[h][c] * pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
        _give_back(scratch["emptied"].at[slot])
        return tuple(scaled)

    return list(lax.fori_loop(0, steps, one, tuple(jnp.zeros(shape, jnp.float32) for _ in range(H))))


def sum_scaled_numbers(
    call: Call, H: int, steps: int, first_stage: Any, of_blocks: list[Any], column: Any, **scratch: Any
) -> list[jax.Array]:
    """The same of packed matrices whose numbers are scaled before they are multiplied, in bfloat16.

    Exact where a number and its scale have no more digits than that together, as those of 4-bit floats; others are rounded.
    Nothing waits for the products of one scale, so blocks may be as small as a group of 16.
    """
    tiles, width = call.tiles, call.tiles.k // call.parts
    read_scale, read_zero = _readers(call, of_blocks, column, width, width)
    own = own_part(call)
    exact = of_blocks[0].dtype in (jnp.uint8, jnp.float8_e4m3fn)

    def accumulate(*sums: Any) -> list[jax.Array]:
        def one(step: Any, nothing: Any) -> None:
            del nothing
            slot = lax.rem(first_stage + step, tiles.stages)
            blocks = _blocks(call, step)
            scale_Hc = [[read_scale(h, block) for block in blocks] for h in range(H)]
            zero_Hc = [[read_zero(h, block) for block in blocks] for h in range(H) if read_zero]
            plgpu.barrier_wait(scratch["filled"].at[slot])
            for h, sum_ref in enumerate(sums):
                scale = _side_by_side(scale_Hc[h], width)
                for part, matrix in enumerate(call.expand(scratch["matrix_tiles"][slot, h, own])):
                    if read_zero:
                        matrix -= _side_by_side(zero_Hc[h], width)
                    if exact:
                        matrix *= scale.astype(jnp.bfloat16)
                    else:
                        matrix = (matrix.astype(jnp.float32) * scale).astype(jnp.bfloat16)
                    first = _first_operand(call, scratch, part, matrix)
                    plgpu.wgmma(sum_ref, first, scratch["row_tiles"].at[slot, part].T)
            plgpu.wgmma_wait(0)
            _give_back(scratch["emptied"].at[slot])

        lax.fori_loop(0, steps, one, None)
        return [sum_ref[...] for sum_ref in sums]

    return pl.run_scoped(accumulate, *[plgpu.ACC(call.own_shape, jnp.float32) for _ in range(H)])


def sum_quantized_rows(
    call: Call,
    H: int,
    steps: int,
    first_stage: Any,
    of_blocks: list[Any],
    column: Any,
    row_scales: Any,
    row: Any,
    **scratch: Any,
) -> list[jax.Array]:
    """The same of rows and matrices of 8 bits: a stage's products are scaled by both in float32, and then added up.

    The tensor core adds up fewer digits than float32 has, where numbers are that small, so its sums are kept short.
    """
    tiles, shape = call.tiles, call.own_shape
    assert call.row_block is not None
    row_block = call.row_block
    read_scale, _ = _readers(call, of_blocks, column, tiles.m, tiles.m)
    own = own_part(call)
    sum_type = jnp.int32 if scratch["row_tiles"].dtype == jnp.int8 else jnp.float32

    def one(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        slot = lax.rem(first_stage + step, tiles.stages)
        [block] = _blocks(call, step)
        scale_H = [read_scale(h, block) for h in range(H)]
        of_rows = row_scales.at[lax.div(step * tiles.k, row_block), pl.ds(row, tiles.m)]
        row_scale = lax.broadcast_in_dim(plgpu.load(of_rows, optimized=False), shape, (1,))
        plgpu.barrier_wait(scratch["filled"].at[slot])
        scaled = list(sums)
        for h in range(H):

            def product(sum_ref: Any, h: int = h) -> jax.Array:
                plgpu.wgmma(sum_ref, scratch["matrix_tiles"].at[slot, h, own], scratch["row_tiles"].at[slot, 0].T)
                plgpu.wgmma_wait(0)
                return sum_ref[...]

            of_stage = pl.run_scoped(product, plgpu.ACC(shape, sum_type)).astype(jnp.float32)
            scaled[h] += scale_H[h] * row_scale * of_stage
        plgpu.barrier_arrive(scratch["emptied"].at[slot])
        return tuple(scaled)

    return list(lax.fori_loop(0, steps, one, tuple(jnp.zeros(shape, jnp.float32) for _ in range(H))))


# From a half and a block of inputs to the number of that block.
Reader = Callable[[int, Any], jax.Array]


def _readers(
    call: Call, of_blocks: list[Any], column: Any, scale_columns: int, zero_columns: int
) -> tuple[Reader, Reader | None]:
    """Readers of scales and, if any, of zero points: scalars; where each output has its own, arrays of so many columns."""
    assert call.block is not None
    scales, *zeros = of_blocks
    bn = call.block[0]
    # Where the last tile sticks out, a warpgroup may have no outputs at all; what it reads instead is not stored.
    first_output = column + lax.axis_index("warpgroup") * WGMMA_ROWS
    first_output = jnp.minimum(first_output, scales.shape[1] * bn - WGMMA_ROWS)

    def reader(ref: Any, decode: Callable[[jax.Array], jax.Array], columns: int) -> Reader:
        def read(h: int, block: Any) -> jax.Array:
            if bn > 1:
                return decode(ref[h, lax.div(first_output, bn), block])
            outputs = plgpu.load(ref.at[h, pl.ds(first_output, WGMMA_ROWS), block], optimized=False)
            return lax.broadcast_in_dim(decode(outputs), (WGMMA_ROWS, columns), (0,))

        return read

    read_zero = reader(zeros[0], zero_number, zero_columns) if zeros else None
    return reader(scales, scale_number, scale_columns), read_zero


def _blocks(call: Call, step: Any) -> list[Any]:
    """The blocks of inputs that a step goes through; beyond the last input, whose rows are zeros there, the last one."""
    assert call.block is not None
    k, bk = call.tiles.k, call.block[1]
    blocks = [lax.div(step * k + first, bk) for first in range(0, k, min(k, bk))]
    return [jnp.minimum(block, call.K // bk - 1) for block in blocks] if call.K % k else blocks


def _side_by_side(of_blocks: list[jax.Array], width: int) -> jax.Array:
    """An array [64, width] of each block's number in as many of its columns as the others' have."""
    shape, each = (WGMMA_ROWS, width), width // len(of_blocks)
    # A thread has the same columns of every array, so most of these comparisons are known when it is compiled.
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    result = jnp.broadcast_to(of_blocks[0], shape)
    for c, number in enumerate(of_blocks[1:], 1):
        result = jnp.where(column >= c * each, number, result)
    return result


def _give_back(emptied: Any) -> None:
    """Let a stage that was read into registers be filled again: not before the accelerator sees that it was read."""
    plgpu.commit_smem()
    plgpu.barrier_arrive(emptied)


def _first_operand(call: Call, scratch: dict[str, Any], part: int, matrix: jax.Array) -> Any:
    """A part of an expanded tile for wgmma: registers; in the interpreter, which takes none, shared memory."""
    if not call.interpret:
        return matrix
    staged = scratch["expanded"].at[lax.axis_index("warpgroup"), part]
    staged[...] = matrix
    return staged


def own_part(call: Call) -> Any:
    """The part of its operand that is this warpgroup's."""
    height = call.own_shape[0]
    return pl.ds(pl.multiple_of(lax.axis_index("warpgroup") * height, height), height)
