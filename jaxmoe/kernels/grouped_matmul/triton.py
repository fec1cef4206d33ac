"""The backend for NVIDIA GPUs since Ampere: tensor cores through Pallas Triton.

A program multiplies up to `m` rows of one group by `n` rows of its matrix. Rows stay where they are: a tile begins at any
row, and what lies beyond its group is masked, in loads and in stores; rows of an MLP may be gathered from where they lie, by
an index of them. Weights stay (out, in): Triton reads a tile of them transposed from shared memory. The first product of an
MLP keeps gate and up in accumulators of their own and stores what the activation makes of them, so that the wide product
never reaches memory.

Float32 is multiplied as `jax.default_matmul_precision` says, by default as TF32, like any other product on a GPU.

Status: right in the interpreter, and built by ptxas for A100 and H100; it has not run on a GPU, so nothing of it is timed,
and "auto" does not choose it. JAX deprecates Pallas Triton since 0.11, and warns where it lowers a program with it.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, N and K of a matrix [N, K], I tiles of rows.
"""

import dataclasses
import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul import portable
from jaxmoe.kernels.grouped_matmul.combine import KERNEL_ACTIVATIONS, Combine
from jaxmoe.kernels.grouped_matmul.gpu import multiprocessors
from jaxmoe.kernels.grouped_matmul.gradient import with_gradient_of
from jaxmoe.kernels.grouped_matmul.row_loops import take_rows
from jaxmoe.kernels.grouped_matmul.tile_table import measured_tiles

# Rows a group on average, up to which the time is that of reading the matrices.
FEW_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that one program multiplies: powers of two, as Triton wants them, and 16 at least.

    Attributes:
        m: rows.
        n: rows of the matrix, those of gate and up together; 32 at least.
        k: inner size of a step.
        stages: steps of k whose loads are under way at once.
        warps: warps of a program.
        band: row tiles that are taken together through all columns, see `_place`.
    """

    m: int
    n: int
    k: int
    stages: int
    warps: int
    band: int = 8


def choose_tiles(
    R: int, G: int, K: int, N: int, itemsize: int, *, processors: int = GPUS["h100"].multiprocessors
) -> Tiles:
    """Tiles for R rows in G groups and matrices [N, K], in one of two regimes; an average group fits into one, if it can.

    Few rows: what takes time is reading the matrices, once, so each program streams a narrow and deep strip of them, and
    strips get narrower where groups are so few that they would leave some of the `processors` idle, which run two programs
    each at once. Many rows: the products take the time, so tiles are as large as registers and the 99 kB of shared memory of
    the smaller GPUs allow. Triton keeps `stages` - 1 steps of k there, and one more on Hopper, which has 227 kB. Nothing of
    it has been measured.
    """
    m = _power_of_two(-(-R // G), 16, 128)
    if R > FEW_ROWS * G:
        n = 256 if m == 128 and N % 256 == 0 and itemsize <= 2 else 128
        sizes = {"n": n, "k": 128 // itemsize, "stages": 3, "warps": _warps(m, n)}
    else:
        filled = max(-(-R // m), min(R, G))  # row tiles, if rows are spread evenly
        n = next((n for n in (64, 32) if filled * -(-N // n) >= 2 * processors), 32)
        sizes = {"n": n, "k": 256 // itemsize, "stages": 4, "warps": 4}
    sizes |= {"n": _power_of_two(N, 32, sizes["n"]), "k": _power_of_two(K, 16, sizes["k"])}
    return Tiles(m=m, **sizes)


def candidate_tiles(R: int, G: int, K: int, N: int, itemsize: int) -> list[Tiles]:
    """Tiles that are worth timing for shapes as of `choose_tiles`, which is one of them; some may not compile."""
    chosen = choose_tiles(R, G, K, N, itemsize)
    sizes = itertools.product(
        {max(16, chosen.m // 2), chosen.m, min(128, 2 * chosen.m)}, (32, 64, 128, 256), (128, 256), (3, 4, 5)
    )
    others = [
        Tiles(m=m, n=n, k=_power_of_two(K, 16, row_bytes // itemsize), stages=stages, warps=_warps(m, n))
        for m, n, row_bytes, stages in sizes
        if stages * (m + n) * row_bytes <= GPUS["h100"].block_shared_memory
    ]
    return list(dict.fromkeys([chosen, *others]))


def _warps(m: int, n: int) -> int:
    """So many that a thread has 64 sums or fewer; 128 in the largest tile."""
    return 4 if m * n <= 64 * 128 else 8


def _power_of_two(wanted: int, least: int, most: int) -> int:
    """The first power of two from `wanted` up, within bounds that are such powers."""
    return max(least, min(most, 1 << max(wanted - 1, 0).bit_length()))


def grouped_matmul(
    lhs_RK: jax.Array,
    rhs_GNK: jax.Array,
    group_sizes_G: jax.Array,
    *,
    out_dtype: jnp.dtype,
    tiles: Tiles | None = None,
    device_kind: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """out[r] = rhs[g(r)] @ lhs[r]; see `Kernels.grouped_matmul`. `tiles` are looked up or chosen unless given."""
    tiles = tiles or measured_tiles(Tiles, device_kind, "triton", lhs_RK, rhs_GNK, out_dtype)

    def forward(arrays: Any, group_sizes_G: jax.Array) -> jax.Array:
        lhs_RK, rhs_GNK = arrays
        if 0 in (*lhs_RK.shape, *rhs_GNK.shape):
            return jnp.zeros((lhs_RK.shape[0], rhs_GNK.shape[1]), out_dtype)
        return _product(lhs_RK, rhs_GNK, None, group_sizes_G, None, out_dtype, tiles, device_kind, interpret)

    def same(arrays: Any, group_sizes_G: jax.Array) -> jax.Array:
        lhs_RK, rhs_GNK = arrays
        return portable.grouped_matmul(lhs_RK, rhs_GNK, group_sizes_G, out_dtype=out_dtype)

    return with_gradient_of(same, forward, (lhs_RK, rhs_GNK), group_sizes_G)


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
    index_R: jax.Array | None = None,
    tiles: tuple[Tiles | None, Tiles | None] = (None, None),
    device_kind: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y = W_down[g] @ combine(W_up[g] @ x + b_up[g]) + b_down[g]; see `Kernels.expert_mlp`.

    With an index, x are the rows x[index]. `tiles` are those of the first and of the second product, looked up or chosen
    unless given.
    """
    places = jax.eval_shape(take_rows, x_RD, index_R)
    up_tiles = tiles[0] or measured_tiles(Tiles, device_kind, "triton.gate_up", places, w_up_pND, x_RD.dtype)
    down_tiles = tiles[1] or measured_tiles(Tiles, device_kind, "triton", places, w_down_pDF, out_dtype)

    def forward(arrays: Any, groups: Any) -> jax.Array:
        (x_RD, w_up, w_down, b_up, b_down), (group_sizes_p, index_R) = arrays, groups
        if 0 in (*places.shape, *w_up.shape, *w_down.shape):
            return jnp.zeros(places.shape, out_dtype)
        options = (device_kind, interpret)
        # Rows of h that no group owns are never written, and never read.
        h_RF = _product(x_RD, w_up, b_up, group_sizes_p, combine, x_RD.dtype, up_tiles, *options, index_R=index_R)
        return _product(h_RF, w_down, b_down, group_sizes_p, None, out_dtype, down_tiles, *options)

    def same(arrays: Any, groups: Any) -> jax.Array:
        (x_RD, w_up, w_down, b_up, b_down), (group_sizes_p, index_R) = arrays, groups
        x_RD = take_rows(x_RD, index_R)
        return portable.expert_mlp(
            x_RD, w_up, w_down, group_sizes_p, b_up_pN=b_up, b_down_pD=b_down, combine=combine, out_dtype=out_dtype
        )

    arrays = (x_RD, w_up_pND, w_down_pDF, b_up_pN, b_down_pD)
    return with_gradient_of(same, forward, arrays, (group_sizes_p, index_R))


class RowTiles(NamedTuple):
    """Rows of each tile of a call.

    Attributes:
        groups: int32 [I], the group; G for rows that no group owns.
        first: int32 [I], the first row.
        end: int32 [I], the row after the group's last, which may be more than a tile away; not above `first` where the
            tile is one too many.
    """

    groups: jax.Array
    first: jax.Array
    end: jax.Array


def row_tiles(group_sizes_G: jax.Array, R: int, m: int) -> RowTiles:
    """Tiles of m rows for R rows in groups of those sizes, cut off at R; the rows after them are one more group.

    A group of s rows, not none, has at most 1 + (s - 1) / m tiles, so n such groups have at most n + (R - n) / m; that is
    most where n is.
    """
    G = group_sizes_G.shape[0]
    n = min(R, G + 1)
    ends = jnp.minimum(jnp.cumsum(group_sizes_G, dtype=jnp.int32), R)
    ends = jnp.append(ends, jnp.int32(R))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    tile_ends = jnp.cumsum(-(-(ends - starts) // m), dtype=jnp.int32)
    tile_starts = jnp.concatenate([jnp.zeros(1, jnp.int32), tile_ends[:-1]])
    tile = jnp.arange(n + (R - n) // m, dtype=jnp.int32)
    # All comparisons at once: a search would be a loop of small kernels.
    group = jnp.minimum(jnp.searchsorted(tile_ends, tile, side="right", method="compare_all"), G).astype(jnp.int32)
    return RowTiles(group, starts[group] + (tile - tile_starts[group]) * m, ends[group])


def _product(
    x_RK: jax.Array,
    w_GNK: jax.Array,
    b_GN: jax.Array | None,
    group_sizes_G: jax.Array,
    combine: Combine | None,
    out_dtype: jnp.dtype,
    tiles: Tiles | None,
    device_kind: str | None,
    interpret: bool,
    *,
    index_R: jax.Array | None = None,
) -> jax.Array:
    """combine(w[g(r)] @ x[r] + b[g(r)]), with anything in rows that no group owns; without `combine` zeros there."""
    if x_RK.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(
            f"the triton kernel multiplies rows of bfloat16, float16 and float32; got {x_RK.dtype}: use the portable one"
        )
    R, (G, N, K) = len(x_RK if index_R is None else index_R), w_GNK.shape
    halves = 2 if combine is not None and combine.gated else 1
    tiles = tiles or choose_tiles(R, G, K, N, x_RK.dtype.itemsize, processors=multiprocessors(device_kind))
    rows = row_tiles(group_sizes_G, R, tiles.m)
    call = pl.pallas_call(
        partial(_kernel, tiles=tiles, combine=combine, gathers=index_R is not None),
        grid=(rows.groups.shape[0] * pl.cdiv(N // halves, tiles.n // halves),),
        out_shape=jax.ShapeDtypeStruct((R, N // halves), out_dtype, manual_axis_type=jax.typeof(x_RK).manual_axis_type),
        compiler_params=plgpu.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_matmul" if combine is None else "grouped_matmul_combine",
    )
    index = () if index_R is None else (index_R,)
    biases = () if b_GN is None else (b_GN,)
    return call(*rows, *index, x_RK, w_GNK, *biases)


def _kernel(
    group_I: Any, first_I: Any, end_I: Any, *refs: Any, tiles: Tiles, combine: Combine | None, gathers: bool
) -> None:
    *index, x, w = refs[: 2 + gathers]
    *biases, out = refs[2 + gathers :]
    (_, K), (G, N, _), F = x.shape, w.shape, out.shape[1]
    halves = N // F
    m, n, k = tiles.m, tiles.n // halves, tiles.k
    row_tile, column_tile = _place(pl.program_id(0), group_I.shape[0], pl.cdiv(F, n), tiles.band)
    group, first, end = group_I[row_tile], first_I[row_tile], end_I[row_tile]
    column = column_tile * n
    in_rows_m = first + jnp.arange(m, dtype=jnp.int32) < end
    in_columns_n = column + jnp.arange(n, dtype=jnp.int32) < F

    def store(y_mn: jax.Array) -> None:
        here = out.at[pl.ds(first, m), pl.ds(column, n)]
        plgpu.store(here, y_mn.astype(out.dtype), mask=in_rows_m[:, None] & in_columns_n[None])

    @pl.when((first < end) & (group < G))
    def of_a_group() -> None:
        own_m = None
        if gathers:
            own_m = plgpu.load(index[0].at[pl.ds(first, m)], mask=in_rows_m, other=0)
            own_m = jnp.clip(own_m, 0, x.shape[0] - 1)  # not beyond all rows, where an index is out of range

        def multiply(step: Any, sums: Any) -> Any:
            here = pl.ds(step * k, k)
            in_k = None if K % k == 0 else step * k + jnp.arange(k, dtype=jnp.int32) < K
            if own_m is None:
                x_mk = _load(x.at[pl.ds(first, m), here], in_rows_m, in_k)
            else:
                in_x = jnp.broadcast_arrays(own_m[:, None], step * k + jnp.arange(k, dtype=jnp.int32)[None])
                x_mk = _load(x.at[*in_x], in_rows_m, in_k)
            w_nk = [_load(w.at[group, pl.ds(half * F + column, n), here], in_columns_n, in_k) for half in range(halves)]
            return tuple(sum_mn + _dot(x_mk, half_nk) for sum_mn, half_nk in zip(sums, w_nk, strict=True))

        sums = lax.fori_loop(0, pl.cdiv(K, k), multiply, (jnp.zeros((m, n), jnp.float32),) * halves)
        for b in biases:
            b_n = [
                plgpu.load(b.at[group, pl.ds(half * F + column, n)], mask=in_columns_n, other=0)
                for half in range(halves)
            ]
            sums = tuple(sum_mn + half_n.astype(jnp.float32)[None] for sum_mn, half_n in zip(sums, b_n, strict=True))
        store(sums[0] if combine is None else combine.halves(*sums, activations=KERNEL_ACTIVATIONS))

    if combine is None:

        @pl.when((first < end) & (group == G))
        def of_none() -> None:
            store(jnp.zeros((m, n), out.dtype))


def _load(tile: Any, in_rows: jax.Array, in_columns: jax.Array | None) -> jax.Array:
    """A tile, zero where it is masked; a mask that is true everywhere is better left out."""
    mask = in_rows[:, None] if in_columns is None else in_rows[:, None] & in_columns
    return plgpu.load(tile, mask=jnp.broadcast_to(mask, tile.shape), other=0)


def _dot(x_mk: jax.Array, w_nk: jax.Array) -> jax.Array:
    return lax.dot_general(x_mk, w_nk, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _place(program: Any, row_tiles: int, column_tiles: int, band: int) -> tuple[Any, Any]:
    """The tile of a program, in an order in which programs that run at the same time share rows and weights in L2.

    Bands of `band` row tiles, which mostly are of one group or two, through all columns; inside a band down the rows
    first.
    """
    first = program // (band * column_tiles) * band
    within = program % (band * column_tiles)
    height = jnp.minimum(row_tiles - first, band)
    return first + within % height, within // height
