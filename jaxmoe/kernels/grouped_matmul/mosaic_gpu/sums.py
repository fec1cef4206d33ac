"""Sums of a tile's products on Hopper, as one of the two warpgroups that multiply computes them.

Letters here, beside the common ones of docs/concepts/letters.md: H halves (gate and up, or one), c chunks of a stage that
share a scale.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxmoe.kernels.grouped_matmul.mosaic_gpu.packed import EXPAND, scale_number, zero_number
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.pipeline import plgpu
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import WARPGROUPS, WGMMA_ROWS, Tiles


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
    scales, *zeros = of_blocks
    tiles, shape, chunk = call.tiles, call.own_shape, call.chunk
    assert call.format is not None
    assert call.block is not None
    expand, (bn, bk) = EXPAND[call.format], call.block
    own, warpgroup = own_part(call), lax.axis_index("warpgroup")
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


def own_part(call: Call) -> Any:
    """The part of its operand that is this warpgroup's."""
    height = call.own_shape[0]
    return pl.ds(pl.multiple_of(lax.axis_index("warpgroup") * height, height), height)
