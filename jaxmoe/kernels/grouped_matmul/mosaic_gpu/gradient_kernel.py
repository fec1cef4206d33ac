"""The kernel of gradients for Hopper: rows by matrices along their outer dim, and outer products summed over a group's rows.

    dx[r] = dy[r] @ W[g(r)]             dW[g] = Σ dy[r]ᵀ x[r], over the rows r of group g

Both are tiles of 128 by up to 256 sums, as those of `kernel` are: one warpgroup of a block keeps bringing stages of two
operands to shared memory, two multiply them. What differs is where an operand comes from. wgmma takes 16-bit operands of
shared memory transposed, so that neither matrices nor rows are copied for it. Rows are summed over in dW: those of other
groups in a group's first and last stage are made zeros in shared memory, in both operands, for they may hold NaN.

It has not run on a GPU. Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix
[N, K].
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT, GroupTiles, offsets_bytes, offsets_shape
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.pipeline import (
    compiler_params,
    copy_rows_out,
    count_tiles,
    drain,
    place,
    plgpu,
    swizzled,
    wait_for_place,
)
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import (
    COMPUTE_REGISTERS,
    LOADER_REGISTERS,
    PIECE_BYTES,
    SHARED_BYTES,
    WARPGROUPS,
    WGMMA_ROWS,
)

# Rows of a tile's sums.
HEIGHT = WARPGROUPS * WGMMA_ROWS
# Rows of a stage of dW, on the reduction dim.
STAGE_ROWS = 64
# Row tiles of dx that run together over the same outputs, as in `tiles`.
_BAND = 8
# Shared memory that barriers and alignment take.
_BARRIER_BYTES = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientTiles:
    """Sizes that one block multiplies at a time, 128 rows of sums by `n`.

    Attributes:
        n: columns of sums, 128 or 256.
        k: numbers of a swizzled row of shared memory, 64, 32 or 16; inner size of a stage of dx.
        stages: stages that are under way at once, two at least.
    """

    n: int
    k: int
    stages: int


def choose_gradient_tiles(G: int, N: int, K: int) -> GradientTiles:
    """Tiles for matrices [G, N, K]; nothing of it has been measured.

    Raises:
        NotImplementedError: N or K is no multiple of what the kernel copies at a time.
    """
    k = next((k for k in (64, 32, 16) if N % k == 0 and K % k == 0), None)
    if k is None:
        raise NotImplementedError(
            f"the mosaic_gpu kernel of gradients multiplies matrices of multiples of 16 outputs and inputs; got N={N}, "
            f"K={K}: use the portable one"
        )
    n = 256 if K > 128 else 128
    results = WARPGROUPS * 2 * WGMMA_ROWS * PIECE_BYTES
    room = SHARED_BYTES - _BARRIER_BYTES - results - offsets_bytes(G)
    return GradientTiles(n=n, k=k, stages=min(4, room // (STAGE_ROWS * (HEIGHT + n) * 2)))


@partial(jax.jit, static_argnames=("tiles", "out_dtype", "blocks", "interpret"))
def multiply_by_columns(
    dy_RN: jax.Array,
    matrices_GNK: jax.Array,
    group_sizes_G: jax.Array,
    tiles: GradientTiles,
    out_dtype: jnp.dtype,
    *,
    blocks: int,
    interpret: bool,
) -> jax.Array:
    """dy[r] @ W[g(r)] of each row; rows that no group owns hold anything.

    R is a multiple of 8 here, and `blocks` the number of multiprocessors.
    """
    R, (G, N, K) = dy_RN.shape[0], matrices_GNK.shape
    column_tiles, steps = pl.cdiv(K, tiles.n), N // tiles.k

    def kernel(*refs: Any, offsets: Any, **scratch: Any) -> None:
        group_sizes, dy, matrices, out = refs
        layout = GroupTiles(group_sizes, offsets, R, HEIGHT)

        def tile_at(number: Any) -> Tile:
            row_tile, column_tile = place(number, layout.used, column_tiles, _BAND)
            group = layout.group_of(row_tile)
            (row, first, last), column = layout.place(row_tile, group), column_tile * tiles.n
            matrix = matrices.at[group]

            def stage_at(step: Any) -> tuple[Any, Any]:
                inner = pl.ds(step * tiles.k, tiles.k)
                return dy.at[pl.ds(row, HEIGHT), inner], matrix.at[inner, pl.ds(column, tiles.n)]

            return Tile(steps, stage_at, None, out, row, first, last, column)

        _multiply_tiles(layout, tile_at, lambda: (layout.used, column_tiles), tiles, transposed=False, **scratch)

    shapes = (HEIGHT, tiles.k), (tiles.k, tiles.n)
    out = jax.ShapeDtypeStruct((R, K), out_dtype)
    call = _call(kernel, out, shapes, dy_RN.dtype, tiles, G, blocks, interpret, masks=False)
    return call(group_sizes_G, dy_RN, matrices_GNK)


@partial(jax.jit, static_argnames=("tiles", "out_dtype", "blocks", "interpret"))
def sum_outer_products(
    dy_RN: jax.Array,
    x_RK: jax.Array,
    group_sizes_G: jax.Array,
    tiles: GradientTiles,
    out_dtype: jnp.dtype,
    *,
    blocks: int,
    interpret: bool,
) -> jax.Array:
    """Σ dy[r]ᵀ x[r] over the rows of each group [G, N, K]; zeros of a group without rows.

    R is a multiple of 8 here, and `blocks` the number of multiprocessors.
    """
    G, (R, N), K = group_sizes_G.shape[0], dy_RN.shape, x_RK.shape[1]
    heights, column_tiles = pl.cdiv(N, HEIGHT), pl.cdiv(K, tiles.n)

    def kernel(*refs: Any, offsets: Any, **scratch: Any) -> None:
        group_sizes, dy, x, out = refs
        layout = GroupTiles(group_sizes, offsets, R, HEIGHT)

        def tile_at(number: Any) -> Tile:
            # The tiles of a group run together, so that the second level of cache has its rows.
            tile_row, column_tile = place(number, G * heights, column_tiles, heights)
            group = lax.div(tile_row, heights)
            top, column = lax.rem(tile_row, heights) * HEIGHT, column_tile * tiles.n
            start, end = layout.rows_of(group)
            first_block = lax.div(start, ALIGNMENT)

            def stage_at(step: Any) -> tuple[Any, Any]:
                rows = pl.ds((first_block + step * (STAGE_ROWS // ALIGNMENT)) * ALIGNMENT, STAGE_ROWS)
                return dy.at[rows, pl.ds(top, HEIGHT)], x.at[rows, pl.ds(column, tiles.n)]

            def own_rows(step: Any) -> tuple[Any, Any]:
                above = first_block * ALIGNMENT + step * STAGE_ROWS
                return start - above, end - above

            rows = jnp.where(end > start, end - first_block * ALIGNMENT, 0)
            steps = lax.div(rows + STAGE_ROWS - 1, STAGE_ROWS)
            return Tile(steps, stage_at, own_rows, out.at[group], top, 0, N - top, column)

        _multiply_tiles(layout, tile_at, lambda: (G * heights, column_tiles), tiles, transposed=True, **scratch)

    shapes = (STAGE_ROWS, HEIGHT), (STAGE_ROWS, tiles.n)
    out = jax.ShapeDtypeStruct((G, N, K), out_dtype)
    call = _call(kernel, out, shapes, dy_RN.dtype, tiles, G, blocks, interpret, masks=True)
    return call(group_sizes_G, dy_RN, x_RK)


class Tile(NamedTuple):
    """A tile of sums, where its operands come from and where it goes to.

    Attributes:
        steps: stages of it, none where its sums are zeros.
        stage_at: function from a step to its two operands in memory.
        own_rows: function from a step to the first of the group's own rows in it and the one after the last, which may be
            beyond the stage; None where rows are not summed over.
        out: matrix that the sums are a part of.
        row: row of `out` where the tile begins.
        first: first row of the tile that is written.
        last: row of the tile after the last that is written, which may be beyond the tile.
        column: column of `out` where the tile begins.
    """

    steps: Any
    stage_at: Callable[[Any], tuple[Any, Any]]
    own_rows: Callable[[Any], tuple[Any, Any]] | None
    out: Any
    row: Any
    first: Any
    last: Any
    column: Any


def _call(
    kernel: Callable[..., None],
    out: jax.ShapeDtypeStruct,
    shapes: tuple[tuple[int, int], tuple[int, int]],
    dtype: Any,
    tiles: GradientTiles,
    G: int,
    blocks: int,
    interpret: bool,
    *,
    masks: bool,
) -> Callable[..., jax.Array]:
    # The interpreter reads no swizzled tile into registers.
    layout = () if interpret else swizzled(tiles.k, dtype)
    width = _piece_width(out.shape[-1], out.dtype)
    slots = 1 if tiles.n // width % 2 else 2
    lhs, rhs = (plgpu.SMEM((tiles.stages, *shape), dtype, transforms=layout) for shape in shapes)
    scratch = {
        "lhs_tiles": lhs,
        "rhs_tiles": rhs,
        "results": plgpu.SMEM(
            (WARPGROUPS, slots, WGMMA_ROWS, width), out.dtype, transforms=swizzled(width, out.dtype, rows=1)
        ),
        "filled": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
        "emptied": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.stages),
        "masked": plgpu.Barrier(num_arrivals=WARPGROUPS),
        "offsets": plgpu.SMEM(offsets_shape(G), jnp.int32),
        "added": plgpu.Barrier(num_arrivals=1),
    }
    return plgpu.kernel(
        kernel,
        out_type=out,
        grid=(blocks,),
        grid_names=("multiprocessor",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=compiler_params(own_barriers=not masks),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )


def _piece_width(columns: int, dtype: Any) -> int:
    """Columns that are written to shared memory at a time: a swizzle wide, and a divisor of those of the whole."""
    most = PIECE_BYTES // jnp.dtype(dtype).itemsize
    return next(width for width in (most, most // 2, most // 4) if columns % width == 0)


def _multiply_tiles(
    layout: GroupTiles,
    tile_at: Callable[[Any], Tile],
    counts: Callable[[], tuple[Any, int]],
    tiles: GradientTiles,
    *,
    transposed: bool,
    lhs_tiles: Any,
    rhs_tiles: Any,
    results: Any,
    filled: Any,
    emptied: Any,
    masked: Any,
    added: Any,
) -> None:
    """Work through this block's tiles, every so many-th of `counts`, as the warpgroup that it is."""
    here, everywhere = lax.axis_index("multiprocessor"), lax.axis_size("multiprocessor")

    def each(body: Callable[[Any, Tile], None]) -> Any:
        """body(number of the first stage, tile) for this block's tiles; gives the number of all stages."""

        def one(i: Any, first_stage: Any) -> Any:
            tile = tile_at(here + i * everywhere)
            body(first_stage, tile)
            return first_stage + tile.steps

        return lax.fori_loop(0, count_tiles(*counts()), one, jnp.int32(0))

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        layout.fill()
        plgpu.barrier_arrive(added)
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")

        def load(first_stage: Any, tile: Tile) -> None:
            def one(step: Any, nothing: Any) -> None:
                del nothing
                slot = wait_for_place(first_stage + step, tiles.stages, emptied)
                for source, place_ in zip(tile.stage_at(step), (lhs_tiles, rhs_tiles), strict=True):
                    plgpu.copy_gmem_to_smem(source, place_.at[slot], filled.at[slot])

            lax.fori_loop(0, tile.steps, one, None)

        drain(each(load), tiles.stages, emptied)

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        plgpu.barrier_wait(added)

        def multiply(first_stage: Any, tile: Tile) -> None:
            sums = _sum_tile(first_stage, tile, tiles, transposed, lhs_tiles, rhs_tiles, filled, emptied, masked)
            _store(sums.astype(results.dtype), tile, results)

        each(multiply)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sum_tile(
    first_stage: Any,
    tile: Tile,
    tiles: GradientTiles,
    transposed: bool,
    lhs_tiles: Any,
    rhs_tiles: Any,
    filled: Any,
    emptied: Any,
    masked: Any,
) -> jax.Array:
    """The sums of this warpgroup's 64 rows of a tile. A stage is given back when the next one's products are under way."""
    top = pl.multiple_of(lax.axis_index("warpgroup") * WGMMA_ROWS, WGMMA_ROWS)
    own = pl.ds(top, WGMMA_ROWS)

    def accumulate(sums: Any) -> jax.Array:
        def one(step: Any, nothing: Any) -> None:
            del nothing
            stage = first_stage + step
            slot = lax.rem(stage, tiles.stages)
            plgpu.barrier_wait(filled.at[slot])
            lhs, rhs = lhs_tiles.at[slot], rhs_tiles.at[slot]
            lhs = lhs.at[:, own] if transposed else lhs.at[own]
            if tile.own_rows is not None:
                _mask(tile.own_rows(step), tiles.k, lhs, rhs, masked)
            plgpu.wgmma(sums, lhs.T if transposed else lhs, rhs)
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _() -> None:
                plgpu.barrier_arrive(emptied.at[lax.rem(stage - 1, tiles.stages)])

        lax.fori_loop(0, tile.steps, one, None)
        plgpu.wgmma_wait(0)

        def give_back() -> None:
            plgpu.barrier_arrive(emptied.at[lax.rem(first_stage + tile.steps - 1, tiles.stages)])

        pl.when(tile.steps > 0)(give_back)
        return sums[...]

    return pl.run_scoped(accumulate, plgpu.ACC((WGMMA_ROWS, tiles.n), jnp.float32))


def _mask(own_rows: tuple[Any, Any], width: int, lhs: Any, rhs: Any, masked: Any) -> None:
    """Make zeros of other groups' rows of a stage: in the first operand each warpgroup its part, of the second a half."""
    first, last = own_rows

    @pl.when((first > 0) | (last < STAGE_ROWS))
    def _() -> None:
        row = lax.broadcasted_iota(jnp.int32, (STAGE_ROWS, width), 0)
        own = (row >= first) & (row < last)
        half = rhs.shape[1] // WARPGROUPS
        left = pl.multiple_of(lax.axis_index("warpgroup") * half, half)
        pieces = [lhs.at[:, pl.ds(start, width)] for start in range(0, WGMMA_ROWS, width)]
        pieces += [rhs.at[:, pl.ds(left + start, width)] for start in range(0, half, width)]
        for piece in pieces:
            piece[...] = jnp.where(own, piece[...], jnp.zeros((), piece.dtype))
        # The tensor cores read by another way than registers are stored.
        plgpu.commit_smem()
        plgpu.barrier_arrive(masked)
        plgpu.barrier_wait(masked)


def _store(sums: jax.Array, tile: Tile, results: Any) -> None:
    """Write this warpgroup's rows of a tile, a piece while the one before is copied out."""
    slots, _, width = results.shape[1:]
    above = lax.axis_index("warpgroup") * WGMMA_ROWS
    for piece, start in enumerate(range(0, sums.shape[1], width)):
        shared = results.at[lax.axis_index("warpgroup"), piece % slots]
        plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        shared[...] = sums[:, start : start + width]
        plgpu.commit_smem()
        copy_rows_out(shared, tile.out, tile.row + above, tile.first - above, tile.last - above, tile.column + start)
