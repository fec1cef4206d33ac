"""Sizes of the tiles that a block of a kernel works on, on Hopper; `choice` has the choice of them."""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul.group_tiles import ALIGNMENT, offsets_bytes
from jaxmoe.kernels.grouped_matmul.predict import Product, likely_sizes, predict, skewed_sizes

# Shared memory that a block may have, on Hopper and on Blackwell, and what barriers and alignment may take of it.
SHARED_BYTES, RESERVED_BYTES = GPUS["h100"].block_shared_memory, 2048
WARPGROUPS = 2
# Rows of wgmma's first operand, and so of what a warpgroup multiplies at least.
WGMMA_ROWS = 64
# Registers of a thread that loads, and of one that multiplies.
LOADER_REGISTERS, COMPUTE_REGISTERS = 40, 232
# The same where those that load gather rows: with 40 ptxas spills addresses.
GATHERING_REGISTERS = 56, 224
# Bytes of a row of results that are copied out at a time, where rows lead: copies begin at a multiple of so many.
PIECE_BYTES = 128
# The most sums of a tile that a thread has: of one matrix; of two, which an activation follows; and of packed matrices,
# whose expanded numbers and scales are beside them. ptxas has room for them in 232 registers at every published shape
# (tests/aot); with 192 sums of two it has not, whatever the activation.
_THREAD_SUMS, _GATED_SUMS, _PACKED_SUMS = 192, 176, 160


# The part of the time on the chip that may show beside that of memory: enough to prefer what has room to spare.
_SHOWS = 1 / 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Sizes that one block multiplies at a time.

    Attributes:
        m: rows, a multiple of 8 up to 256; of 128 unless `swapped`.
        n: outputs of each of gate and up, or of a single matrix; a multiple of 128 if `swapped`, else of 64, and 128 where
            matrices are packed.
        k: inner size of a stage of the pipeline; two swizzles of 128 bytes at most.
        stages: stages that are under way at once.
        swapped: flag that matrices are wgmma's first operand and rows its second, for it takes 64 of the first at least, but
            any multiple of 8 of the second, as few rows a group need. The two warpgroups share the outputs then, and else
            the rows.
        band: row tiles that run together over the same outputs, so that the second level of cache serves them.
        splits: parts of the inner dimension that are tiles of their own, where there are fewer tiles than multiprocessors.
            Gate and up are one matrix of twice as many outputs then; `splits` has what adds the parts up.
        cluster: blocks, 1 or 2, that have the same rows and neighboring outputs, and read the rows once for both, see
            `kernel`.
    """

    m: int
    n: int
    k: int
    stages: int
    swapped: bool = False
    band: int = 8
    splits: int = 1
    cluster: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """A product that tiles are chosen for.

    Attributes:
        R: rows.
        G: groups.
        halves: 2 where gate and up are multiplied together, else 1.
        N: outputs, of each half.
        K: inner dimension.
        row_bytes: bytes of a number of a row.
        out_bytes: bytes of a number of the result.
        weight_bits: bits of a number of a matrix.
        block: outputs and inputs that share a scale, of packed matrices.
        format: format of packed matrices.
        row_block: inner numbers of a row that share a scale, of quantized rows; None of others.
        gathered: flag that the kernel gathers the rows.
    """

    R: int
    G: int
    halves: int
    N: int
    K: int
    row_bytes: int = 2
    out_bytes: int = 2
    weight_bits: int = 16
    block: tuple[int, int] | None = None
    format: str | None = None
    row_block: int | None = None
    gathered: bool = False

    @property
    def packed(self) -> bool:
        """Whether matrices are packed: wgmma's first operand, for registers, where most are expanded, can be no other."""
        return self.block is not None

    @property
    def rows_may_lead(self) -> bool:
        """Whether rows can be wgmma's first operand, in tiles that are not `swapped`.

        Mosaic GPU then writes results by 128 bytes of a row, of which a row of the whole must be a multiple.
        """
        return not self.packed and self.N % 64 == 0

    @property
    def output_unit(self) -> int:
        """Outputs that N is a multiple of: 16 bytes of results, or as many as a warpgroup scales.

        Where each output has scales of its own, and there is a tile of them, the last tile begins as early as it has to.
        """
        each_scaled = self.block is not None and self.block[0] == 1
        return WGMMA_ROWS if self.packed and not (each_scaled and self.N >= WARPGROUPS * WGMMA_ROWS) else 8

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Rows of tiles that are `swapped`: what wgmma's second operand takes; less is possible where it is of integers."""
        sizes = range(ALIGNMENT, 256 + 1, ALIGNMENT)
        integers = self.row_block is not None and self.format == "int8"
        return tuple(m for m in sizes if m <= 32 or m % 16 == 0 or not integers)

    @property
    def column_sizes(self) -> tuple[int, ...]:
        """Outputs of tiles that are `swapped`: those worth trying; all that there are where matrices are packed."""
        return (128,) if self.packed else (128, 256)

    @property
    def inner_sizes(self) -> tuple[int, ...]:
        """Inner sizes worth trying: the widest that is one swizzle wide, and twice that where it divides K."""
        k = inner_tile(self)
        return (k,) if self.packed or self.K % (2 * k) else (k, 2 * k)

    def split_sizes(self, k: int) -> tuple[int, ...]:
        """Parts of the inner dimension worth trying, for stages of that size."""
        return (1,) if self.packed else tuple(parts for parts in range(1, 17) if self.K // k % parts == 0)

    def clusters(self, tiles: Tiles) -> tuple[int, ...]:
        """Blocks that may share the rows of such tiles: two where each has whole swizzles, 8 rows, of them to read.

        One where matrices are packed, see `kernel`, where the inner dimension is in parts, as there are too few tiles, and
        where rows are gathered, which only the accelerator could write to both.
        """
        alone = self.packed or self.gathered or tiles.splits > 1
        return (1,) if alone or tiles.m % (2 * ALIGNMENT) else (1, 2)

    def cost(self, tiles: Tiles) -> tuple[float, ...]:
        """Rank tiles, the best lowest: by having too few stages, by time, and of equally fast ones the most stages first.

        A stage that comes late is waited for, where two are under way. The model hides all that is shorter than memory's
        time; a part of it may show, so of two that memory bounds the one that leaves the chip more idle is better.
        """
        found = [predict(product, tiles, GPUS["h100"]) for product in self._products]
        late = tiles.stages < min(3, self.steps(tiles))
        return late, sum(each.seconds + _SHOWS * each.on_chip for each in found), -tiles.stages

    @cached_property
    def _products(self) -> list[Product]:
        """The product with even routing, and with one where few groups have most rows: tiles should suit both."""
        names = ("halves", "N", "K", "row_bytes", "out_bytes", "weight_bits")
        sizes = {name: getattr(self, name) for name in names}
        routings = (likely_sizes(self.R, 1, self.G), skewed_sizes(self.R, self.G))
        return [Product(sizes=rows, **sizes) for rows in routings]

    def steps(self, tiles: Tiles) -> int:
        """Stages of one tile; the last may go on beyond the inner dimension, where zeros come."""
        return math.ceil(self.K / (tiles.k * tiles.splits))

    def least_stages(self, tiles: Tiles) -> int:
        """Stages that are needed to go on: where a stage is given back when the next is under way, that needs a place."""
        return 1 if self.packed or self.steps(tiles) == 1 else 2

    def shared_bytes(self, tiles: Tiles) -> int:
        """Shared memory that those tiles need."""
        stage = tiles.m * tiles.k * self.row_bytes + self.halves * tiles.n * tiles.k * self.weight_bits // 8
        width, slots = piece_of_results(tiles, self.out_bytes)
        results = WARPGROUPS * slots * piece_rows_of_results(tiles) * width * self.out_bytes
        return tiles.stages * stage + results + offsets_bytes(self.G) + RESERVED_BYTES

    def fits(self, tiles: Tiles) -> bool:
        """Tell whether a block has the shared memory, and each of its threads the registers (ptxas spills at more).

        Tiles of a cluster do not fit where its blocks could share no rows.
        """
        if tiles.cluster not in self.clusters(tiles):
            return False
        if tiles.splits > 1:
            parts = dataclasses.replace(self, halves=1, N=self.halves * self.N, out_bytes=4)
            return parts.fits(dataclasses.replace(tiles, splits=1))
        sums = self.halves * tiles.m * tiles.n // (WARPGROUPS * 128)
        if self.block is None:
            registers = sums
        elif self.row_block is not None:  # sums, those of a stage for one half, and scales of rows
            registers = sums + sums // self.halves + tiles.m // 4
        elif scales_numbers(self.format, self.block):  # sums, and the expanded numbers
            registers = sums + tiles.k // 2
        else:  # sums of a block of inputs and the sum of those, the expanded numbers, scales and zero points
            registers = 2 * sums + tiles.k // 2 + 8
        most = _PACKED_SUMS if self.packed else _GATED_SUMS if self.halves == 2 else _THREAD_SUMS
        if self.packed and self.gathered:  # expanded numbers leave none to spare for a loader that gathers
            most -= COMPUTE_REGISTERS - GATHERING_REGISTERS[1]
        return self.shared_bytes(tiles) <= SHARED_BYTES and registers <= most

    def works(self, tiles: Tiles) -> bool:
        """Tell whether tiles fit, and have the stages that are needed to go on."""
        return tiles.stages >= self.least_stages(tiles) and self.fits(tiles)

    def check(self, tiles: Tiles) -> None:
        """Refuse tiles that the kernel would not work with.

        Raises:
            ValueError: they do not divide what they must, or do not fit.
            NotImplementedError: no tiles would work, see `inner_tile`.
        """
        widest = max(self.inner_sizes)
        # What is copied out begins at a multiple of 128 bytes in shared memory, so a row of it has 64 numbers.
        rows, outputs = (ALIGNMENT, WARPGROUPS * WGMMA_ROWS) if tiles.swapped else (WARPGROUPS * WGMMA_ROWS, 64)
        if widest % tiles.k or (self.K % tiles.k and tiles.k != widest):
            raise ValueError(f"k must divide {self.K}; got {tiles}: use {inner_tile(self)}")
        if tiles.m % rows or tiles.n % outputs or not (0 < tiles.m <= 256 and 0 < tiles.n <= 256):
            raise ValueError(f"m must be a multiple of {rows} and n of {outputs}, up to 256; got {tiles}")
        if tiles.swapped and tiles.m not in self.row_sizes:
            raise ValueError(f"m must be one of {self.row_sizes} where rows are integers; got {tiles}")
        if tiles.stages < self.least_stages(tiles) or tiles.band < 1:
            raise ValueError(f"stages must be {self.least_stages(tiles)} at least, and band 1; got {tiles}")
        if tiles.splits not in self.split_sizes(tiles.k):
            raise ValueError(f"splits must be one of {self.split_sizes(tiles.k)} here; got {tiles}")
        if tiles.cluster not in self.clusters(tiles):
            raise ValueError(f"cluster must be one of {self.clusters(tiles)} here; got {tiles}")
        if self.packed and tiles.n not in self.column_sizes:
            raise ValueError(f"n must be 128 where matrices are packed, for a warpgroup scales 64 outputs; got {tiles}")
        if not (tiles.swapped or self.rows_may_lead):
            raise ValueError(
                f"tiles must be swapped where matrices are packed or N, here {self.N}, is no multiple of 64; got {tiles}"
            )
        if not self.fits(tiles):
            raise ValueError(
                f"{tiles} need {self.shared_bytes(tiles)} bytes of shared memory, of {SHARED_BYTES}, or too many registers: "
                "use fewer stages or smaller tiles"
            )


def piece_rows_of_results(tiles: Tiles) -> int:
    """Rows of a tile that one warpgroup has the results of."""
    return tiles.m if tiles.swapped else tiles.m // WARPGROUPS


def piece_of_results(tiles: Tiles, out_bytes: int) -> tuple[int, int]:
    """Outputs of a warpgroup that are written to shared memory at a time, and the pieces that it has room for.

    Where rows lead a piece is 128 bytes wide, and one is written while another is copied out: 32 KiB for 128 rows in any
    dtype, where a whole tile of 256 outputs in float32 takes 128 KiB and leaves room for two stages. Swapped tiles are
    smaller and are written at once.
    """
    if tiles.swapped:
        return tiles.n // WARPGROUPS, 1
    width = PIECE_BYTES // out_bytes
    return width, 1 if tiles.n // width % 2 else 2


def results_are_swizzled(tiles: Tiles, N: int, out_dtype: Any) -> bool:
    """Tell whether results lie in shared memory so that storing them meets no bank twice.

    Of `swapped` tiles those of 2 bytes alone do, in matrices of whole swizzles: of wgmma's 64 outputs Mosaic GPU stores
    no 32, as there are in a swizzle of 4 bytes each.
    """
    return not tiles.swapped or (jnp.dtype(out_dtype).itemsize == 2 and N % 64 == 0)


def scales_numbers(format: str | None, block: tuple[int, int]) -> bool:
    """Tell whether numbers are scaled before they are multiplied, and not the sums of those that share a scale.

    Where it is exact, in bfloat16, and where so few share a scale that they make no product of their own.
    """
    return format in ("mxfp4", "nvfp4") or block[1] % 32 != 0


def inner_tile(problem: Problem) -> int:
    """The widest inner tile, up to 128 bytes a row of it, that divides K and the blocks that share a scale.

    Of 4-bit numbers one of 64 need not divide K, of which 32 are 16 bytes: the last goes on beyond K, where zeros come.
    """
    if problem.block is not None and problem.row_block is not None:
        # A stage has one scale of each.
        widths = [k for k in (128, 64, 32) if problem.block[1] % k == 0 and problem.row_block % k == 0] or [32]
    elif problem.packed:
        # Two 4-bit numbers a byte, and at least 32 bytes a copy.
        widths = [k for k in (128, 64, 32) if k * problem.weight_bits >= 32 * 8]
    else:
        widths = [64, 32, 16]
    unit = 32 if problem.weight_bits == 4 else widths[-1]
    k = next((k for k in widths if problem.K % k == 0), widths[-1])
    if problem.K % unit or problem.N % problem.output_unit:
        raise NotImplementedError(
            f"the mosaic_gpu kernel multiplies matrices of a multiple of {problem.output_unit} outputs and of {unit} inputs "
            f"here; got N={problem.N}, K={problem.K}: use the portable one"
        )
    if problem.block is not None:
        bn, bk = problem.block
        if (bn != 1 and bn % WGMMA_ROWS) or bk % 8 or (bk % k and k % bk) or (problem.row_block or k) % k:
            raise NotImplementedError(
                "the mosaic_gpu kernel wants a scale for each output or for a multiple of 64, and for a multiple of 8 "
                f"inputs that divides {k} or that {k} divides; got blocks of {problem.block} in matrices of {problem.N} by "
                f"{problem.K}: use the portable one"
            )
    return k
