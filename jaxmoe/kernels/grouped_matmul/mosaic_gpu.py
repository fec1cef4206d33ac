"""The backend for Hopper GPUs: tensor cores through Pallas Mosaic GPU.

A persistent grid over the multiprocessors; in each block one warpgroup brings tiles of rows and weights to shared memory
by TMA, and two multiply them by wgmma, each for half of the rows. Weights stay (out, in): wgmma reads them transposed
from shared memory. Rows are first copied to a layout in which no tile has rows of two groups (`group_tiles`).

Status: right in the interpreter, and built for an H100 by ptxas; it has not run on a GPU, so nothing of it is timed, and
"auto" does not choose it. The two products of an MLP are two kernels, with the activation between them in XLA.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

from jaxmoe.kernels.grouped_matmul import portable
from jaxmoe.kernels.grouped_matmul.activations import Combine
from jaxmoe.kernels.grouped_matmul.group_tiles import GroupTiles, lay_out

# Its types are still moving, and a checker would hold them against us.
plgpu: Any = mosaic_gpu

# Shared memory that a block may have, and multiprocessors; of H100 and H200 SXM.
_SHARED_BYTES, _MULTIPROCESSORS = 227 * 2**10, 132
_COMPUTE_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What one block multiplies at a time.

    Attributes:
        m: rows of each of the two warpgroups, a multiple of 64.
        n: columns.
        k: numbers of the inner dimension a stage.
        stages: tiles of rows and weights that are under way at once.
    """

    m: int
    n: int
    k: int
    stages: int

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return _COMPUTE_WARPGROUPS * self.m


def choose_tiles(R: int, G: int, K: int, N: int, itemsize: int, out_itemsize: int) -> Tiles:
    """The largest tiles that divide the matrices and fit; half the rows where groups are small.

    Raises:
        NotImplementedError: N is no multiple of 32 or K none of 32.
    """
    n = next((n for n in (128, 96, 64, 32) if N % n == 0), None)
    k = next((k for k in (64, 32) if K % k == 0), None)
    if n is None or k is None:
        raise NotImplementedError(
            f"the mosaic_gpu kernel multiplies matrices [N, K] of multiples of 32; got N={N}, K={K}: use the portable one"
        )
    m = 64 if R < 128 * G else 128
    rows = _COMPUTE_WARPGROUPS * m
    free = _SHARED_BYTES - rows * n * out_itemsize - 1024  # barriers
    stages = min(4, K // k, free // ((rows + n) * k * itemsize))
    return Tiles(m=m, n=n, k=k, stages=max(stages, 1))


def grouped_matmul(
    lhs_RK: jax.Array,
    rhs_GNK: jax.Array,
    group_sizes_G: jax.Array,
    *,
    out_dtype: jnp.dtype,
    interpret: bool = False,
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r]; see `api.grouped_matmul`."""

    def forward(lhs_RK: jax.Array, rhs_GNK: jax.Array) -> jax.Array:
        if 0 in (*lhs_RK.shape, *rhs_GNK.shape):
            return jnp.zeros((lhs_RK.shape[0], rhs_GNK.shape[1]), out_dtype)
        tiles = _tiles_of(lhs_RK, rhs_GNK, out_dtype)
        layout = lay_out(group_sizes_G, lhs_RK.shape[0], tiles.rows)
        out = _product(_placed(lhs_RK, layout), rhs_GNK, layout, tiles, out_dtype, interpret)
        return _taken(out, layout)

    def backward(lhs_RK: jax.Array, rhs_GNK: jax.Array) -> jax.Array:
        return portable.grouped_matmul(lhs_RK, rhs_GNK, group_sizes_G, out_dtype=out_dtype)

    return _with_gradient_of(forward, backward)(lhs_RK, rhs_GNK)


def expert_mlp(
    x_RD: jax.Array,
    w_up_pND: jax.Array,
    w_down_pDF: jax.Array,
    group_sizes_p: jax.Array,
    *,
    b_up_pN: jax.Array | None,
    b_down_pD: jax.Array | None,
    combine: Combine,
    out_dtype: jnp.dtype,
    interpret: bool = False,
) -> jax.Array:
    """y = W_down[g] @ combine(W_up[g] @ x + b_up[g]) + b_down[g]; see `api.expert_mlp`.

    Rows are laid out once for both products.
    """
    float32 = jnp.dtype(jnp.float32)

    def forward(x_RD: jax.Array, w_up: jax.Array, w_down: jax.Array, b_up: Any, b_down: Any) -> jax.Array:
        if 0 in (*x_RD.shape, *w_up.shape, *w_down.shape):
            return jnp.zeros(x_RD.shape, out_dtype)
        up, down = _tiles_of(x_RD, w_up, float32), _tiles_of(x_RD, w_down, float32)
        assert up.rows == down.rows
        layout = lay_out(group_sizes_p, x_RD.shape[0], up.rows)
        group = jnp.repeat(layout.groups, up.rows)
        h = _product(_placed(x_RD, layout), w_up, layout, up, float32, interpret)
        h = combine(h if b_up is None else h + b_up[group].astype(float32)).astype(x_RD.dtype)
        y = _product(h, w_down, layout, down, float32, interpret)
        y = y if b_down is None else y + b_down[group].astype(float32)
        return _taken(y, layout).astype(out_dtype)

    def backward(x_RD: jax.Array, w_up: jax.Array, w_down: jax.Array, b_up: Any, b_down: Any) -> jax.Array:
        return portable.expert_mlp(
            x_RD, w_up, w_down, group_sizes_p, b_up_pN=b_up, b_down_pD=b_down, combine=combine, out_dtype=out_dtype
        )

    return _with_gradient_of(forward, backward)(x_RD, w_up_pND, w_down_pDF, b_up_pN, b_down_pD)


def _with_gradient_of(forward: Callable[..., jax.Array], other: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`forward` with the gradient of `other`, which computes the same."""
    function = jax.custom_vjp(forward)
    function.defvjp(lambda *args: (forward(*args), args), lambda args, dy: jax.vjp(other, *args)[1](dy))
    return function


def _tiles_of(rows: jax.Array, matrices: jax.Array, out_dtype: jnp.dtype) -> Tiles:
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"the mosaic_gpu kernel multiplies bfloat16 and float16; got {rows.dtype}: use the portable one"
        )
    G, N, K = matrices.shape
    return choose_tiles(rows.shape[0], G, K, N, rows.dtype.itemsize, out_dtype.itemsize)


def _placed(rows_RK: jax.Array, layout: GroupTiles) -> jax.Array:
    return rows_RK.at[layout.source].get(mode="fill", fill_value=0)


def _taken(out: jax.Array, layout: GroupTiles) -> jax.Array:
    # Tiles beyond the used ones hold anything; no owned row is taken from there.
    return jnp.where(layout.owned[:, None], out[layout.places], 0)


def _product(
    rows: jax.Array, matrices: jax.Array, layout: GroupTiles, tiles: Tiles, out_dtype: jnp.dtype, interpret: bool
) -> jax.Array:
    """The product of each tile of rows with the matrix of its group."""
    N = matrices.shape[1]
    kernel = plgpu.kernel(
        partial(_kernel, tiles=tiles),
        out_type=jax.ShapeDtypeStruct((rows.shape[0], N), out_dtype),
        grid=(2 if interpret else _MULTIPROCESSORS,),
        grid_names=("block",),
        num_threads=_COMPUTE_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **({"interpret": plgpu.InterpretGPUParams()} if interpret else {}),
    )
    return kernel(rows, matrices, layout.groups, layout.used)


def _kernel(rows: Any, matrices: Any, group_I: Any, used: Any, out: Any, *, tiles: Tiles) -> None:
    K, N = rows.shape[1], out.shape[1]
    column_tiles = N // tiles.n
    inputs = _swizzled(tiles.k, rows.dtype)

    def make_pipeline(body: Callable, context: Callable) -> Any:
        return plgpu.emit_pipeline_warp_specialized(
            body,
            grid=(K // tiles.k,),
            in_specs=[
                plgpu.BlockSpec((size, tiles.k), lambda k: (0, k), transforms=inputs, memory_space=plgpu.SMEM)
                for size in (tiles.rows, tiles.n)
            ],
            memory_registers=40,
            wg_axis="warpgroup",
            num_compute_wgs=_COMPUTE_WARPGROUPS,
            max_concurrent_steps=tiles.stages,
            compute_context=context,
        )

    def nothing(*args: Any) -> None:
        del args

    @partial(
        pl.run_scoped,
        buffers=make_pipeline(nothing, nothing).get_allocations(rows, matrices.at[0]),
        result=plgpu.SMEM((_COMPUTE_WARPGROUPS, tiles.m, tiles.n), out.dtype, transforms=_swizzled(tiles.n, out.dtype)),
        collective_axes="warpgroup",
    )
    def _(buffers: Any, result: Any) -> None:
        warpgroup = jax.lax.axis_index("warpgroup")
        own = pl.ds(warpgroup * tiles.m, tiles.m)

        # Neighbouring blocks take columns of the same rows: those, the larger operand of a stage, stay in L2.
        @plgpu.nd_loop((group_I.shape[0] * column_tiles,), collective_axes="block")
        def _(step: Any) -> None:
            row_tile, column_tile = step.index[0] // column_tiles, step.index[0] % column_tiles

            @pl.when(row_tile < used[0])
            def _() -> None:
                here = pl.ds(row_tile * tiles.rows, tiles.rows)
                columns = pl.ds(column_tile * tiles.n, tiles.n)

                def accumulate(run: Callable) -> None:
                    @partial(pl.run_scoped, sums=plgpu.ACC((tiles.m, tiles.n), jnp.float32))
                    def _(sums: Any) -> None:
                        run(sums)
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        result[warpgroup] = sums[...].astype(out.dtype)
                        plgpu.commit_smem()
                        plgpu.copy_smem_to_gmem(result.at[warpgroup], out.at[here, columns].at[own])

                def multiply(_: Any, row_part: Any, matrix_part: Any, sums: Any) -> Any:
                    plgpu.wgmma(sums, row_part.at[own], matrix_part.T)
                    plgpu.wgmma_wait(0)
                    return sums

                pipeline = make_pipeline(multiply, accumulate)
                pipeline(rows.at[here, :], matrices.at[group_I[row_tile], columns, :], allocations=buffers)

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _swizzled(width: int, dtype: Any) -> tuple[Any, ...]:
    """The layout in shared memory that TMA writes and wgmma reads without bank conflicts."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(width * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)
