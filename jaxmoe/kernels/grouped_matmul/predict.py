"""The predicted time of a grouped product: a model of the Hopper kernel, to choose by and to hold measurements against.

A persistent kernel shares its tiles out over the multiprocessors. In each of them one warpgroup loads stages and others
multiply them, so a tile takes the longer of loading it and of multiplying it and writing its results. All of it together
takes no less than the memory does:

    seconds = launch + max(bytes / memory bandwidth, waves · max(loads of a tile, products of a tile + results of a tile))

Nothing of it has been fitted to a measurement: each constant says where it is from, and the first times of a GPU will say
which of them is wrong. Letters here, beside the common ones of docs/concepts/letters.md: N and K of a matrix [N, K].
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Protocol, TypeVar

from jaxmoe.hardware import GPU

# Shares of the data sheet's rates that a product of 8192³ numbers (798 of 989 TFLOP/s) and a copy (3.0 of 3.35 TB/s) were
# seen to reach on an H100.
PRODUCT_SHARE, MEMORY_SHARE = 798 / 989, 3.0 / 3.35
# Bytes a cycle from the second level of cache: to one multiprocessor by the width of its port, and to each of all of them
# together. A public H100 kernel with tiles of 128 by 256 and no multicast reaches 660 TFLOP/s, so takes 31 or more.
CACHE_PORT, CACHE_SHARE = 64, 31
# The part of the second level of cache that can be counted on, for everything passes through it.
CACHE_KEPT = 0.5
# Cycles from one multiprocessor of a cluster to the other, as published microbenchmarks of an H100 have them, rounded up.
NEIGHBOR_CYCLES = 200
# Bytes a cycle from shared memory to a multiprocessor.
SHARED_BYTES = 128
# Cycles from asking for a stage to having it, when all ask; and those from one tile to the next that nothing hides, a
# search for the next one's group among them, of some 45 for each halving.
REFILL_CYCLES, TILE_CYCLES = 1400, 400
# Threads of a warp that meet in one bank where results of 2 bytes lie in shared memory unswizzled; half as many of 4 bytes.
UNSWIZZLED_CONFLICTS = 8
# Instructions for each result: rounding, addresses and a store; and those of an activation with an approximate exponential,
# of two instructions where an accurate one has eight, and a division.
RESULT_INSTRUCTIONS, ACTIVATION_INSTRUCTIONS = 4, 18
# Instructions for each packed number that is expanded in registers.
EXPAND_INSTRUCTIONS = 2
# Seconds of starting a kernel.
LAUNCH_SECONDS = 3e-6
# Cycles until a block has the first sizes of groups, and for each of them: 12 instructions, and what the second level of
# cache takes longer for the next sixteen.
SIZES_CYCLES, GROUP_CYCLES = 600, 17
# Seconds of the small kernel that adds up parts of the inner dimension.
SUM_SECONDS = 2e-6
# Rows begin at a multiple of this many, see `group_tiles`.
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A grouped product of rows with matrices.

    Attributes:
        sizes: rows of each group.
        halves: 2 where gate and up are multiplied together, with an activation behind them, else 1.
        N: outputs, of each half.
        K: inner dimension.
        row_bytes: bytes of a number of a row.
        out_bytes: bytes of a number of the result.
        weight_bits: bits of a number of a matrix.
    """

    sizes: tuple[int, ...]
    halves: int
    N: int
    K: int
    row_bytes: int = 2
    out_bytes: int = 2
    weight_bits: int = 16

    @property
    def rows(self) -> int:
        """Rows of all groups."""
        return sum(self.sizes)

    @property
    def matrix_bytes(self) -> float:
        """Bytes of one group's matrices."""
        return self.halves * self.N * self.K * self.weight_bits / 8

    @property
    def flops(self) -> float:
        """Multiplications and additions, of rows that there are."""
        return 2.0 * self.rows * self.halves * self.N * self.K


class TileSizes(Protocol):
    """The sizes that the model looks at, of `mosaic_gpu.Tiles`; those of a kernel with other names it does not take."""

    @property
    def m(self) -> int:
        """Rows of a tile."""

    @property
    def n(self) -> int:
        """Outputs of a tile, of each half."""

    @property
    def k(self) -> int:
        """Inner numbers of a stage."""

    @property
    def stages(self) -> int:
        """Stages under way at once."""

    @property
    def band(self) -> int:
        """Row tiles that run together over the same outputs."""

    @property
    def swapped(self) -> bool:
        """Whether matrices are wgmma's first operand."""

    @property
    def splits(self) -> int:
        """Parts of the inner dimension that are tiles of their own."""

    @property
    def cluster(self) -> int:
        """Blocks that have the same rows and neighboring outputs, and read the rows once for all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The modeled time of one product.

    Attributes:
        seconds: time of all of it.
        bound: part that it would not be shorter without: "memory", "cache", "latency" (too few stages under way),
            "products", "operands" (of the tensor cores, from shared memory), "expanding", "results" or "launch".
        on_chip: time that the multiprocessors take, memory aside.
        parts: seconds of each of these, as if there were nothing else; waves are counted in.
        tiles: tiles of all multiprocessors.
        waves: tiles of the multiprocessor with the most.
        nbytes: bytes that memory reads and writes.
    """

    seconds: float
    bound: str
    on_chip: float
    parts: dict[str, float]
    tiles: int
    waves: int
    nbytes: float


def predict(product: Product, tiles: TileSizes, gpu: GPU, *, store_conflicts: int | None = None) -> Prediction:
    """Model the time of a product with some tiles on a kind of GPU.

    Args:
        product: product.
        tiles: sizes of the tiles.
        gpu: kind of GPU, in terms of its data sheet.
        store_conflicts: threads that meet in one bank of shared memory when results are stored; None for those of the
            kernel, whose results are swizzled unless its tiles are swapped and they have 4 bytes.

    >>> from types import SimpleNamespace
    >>> from jaxmoe.hardware import GPUS
    >>> tiles = SimpleNamespace(m=16, n=128, k=64, stages=5, band=8, swapped=True, splits=1, cluster=1)
    >>> decode = Product(sizes=(1,) * 128, halves=2, N=768, K=2048)
    >>> predict(decode, tiles, GPUS["h100"]).bound
    'memory'
    """
    if tiles.splits > 1:  # of one matrix, without an activation, in float32
        product = dataclasses.replace(product, halves=1, N=product.halves * product.N, out_bytes=4)
    row_tiles = count_row_tiles(product.sizes, tiles.m)
    # A cluster has as many tiles at a time as blocks, which wait for each other.
    of_clusters = row_tiles * math.ceil(product.N / (tiles.cluster * tiles.n)) * tiles.splits
    count = of_clusters * tiles.cluster
    waves = math.ceil(of_clusters / (gpu.multiprocessors // tiles.cluster))
    neighbor = NEIGHBOR_CYCLES if tiles.cluster > 1 else 0
    cycle = 1e-9 / gpu.clock_ghz
    steps = math.ceil(product.K / (tiles.k * tiles.splits))
    nbytes = memory_bytes(product, tiles, gpu)
    outputs = product.halves * tiles.n
    # Of one stage, but for the results, which are of one tile.
    rows, matrices = tiles.k * tiles.m * product.row_bytes, tiles.k * outputs * product.weight_bits / 8
    busy = min(count, gpu.multiprocessors)
    # All that a block has comes through its port, but the cache gives the rows of a cluster once.
    share = CACHE_SHARE * gpu.multiprocessors / max(busy, 1)
    cache = max((rows + matrices) / CACHE_PORT, (rows / tiles.cluster + matrices) / share) * cycle
    latency = (REFILL_CYCLES + neighbor) / max(tiles.stages - 1, 1) * cycle
    products = 2 * tiles.m * outputs * tiles.k / (gpu.flops / gpu.multiprocessors * PRODUCT_SHARE)
    operands = _operand_bytes(product, tiles) / SHARED_BYTES * cycle
    packed = product.weight_bits < 8 * product.row_bytes
    expanding = EXPAND_INSTRUCTIONS * outputs * tiles.k / gpu.fp32_units * cycle if packed else 0.0
    if store_conflicts is None:
        swizzled = not tiles.swapped or (product.out_bytes == 2 and product.N % 64 == 0)
        store_conflicts = 1 if swizzled else UNSWIZZLED_CONFLICTS * 2 // product.out_bytes
    results = (_result_cycles(product, tiles, gpu, store_conflicts) + neighbor) * cycle
    loading = steps * max(cache, latency)
    # Expanding and multiplying take turns in a warpgroup.
    multiplying = steps * (max(products, operands) + expanding) + results
    on_chip = waves * max(loading, multiplying) + REFILL_CYCLES * cycle
    memory = nbytes / (gpu.memory_bandwidth * MEMORY_SHARE)
    finding = (SIZES_CYCLES + GROUP_CYCLES * len(product.sizes)) * cycle
    launch = LAUNCH_SECONDS + finding + (SUM_SECONDS if tiles.splits > 1 else 0)
    of_steps = {
        "cache": cache, "latency": latency, "products": products, "operands": operands, "expanding": expanding,
    }  # fmt: skip
    parts = {"memory": memory, **{name: waves * steps * part for name, part in of_steps.items()}}
    parts |= {"results": waves * results, "launch": launch}
    return Prediction(
        seconds=launch + max(memory, on_chip),
        bound=_bound(parts, memory=memory, on_chip=on_chip, loading=loading > multiplying),
        on_chip=on_chip,
        parts=parts,
        tiles=count,
        waves=waves,
        nbytes=nbytes,
    )


def _bound(parts: dict[str, float], *, memory: float, on_chip: float, loading: bool) -> str:
    if parts["launch"] > max(memory, on_chip):
        return "launch"
    if memory >= on_chip:
        return "memory"
    names = ("cache", "latency") if loading else ("products", "operands", "expanding", "results")
    return max(names, key=lambda name: parts[name])


def _operand_bytes(product: Product, tiles: TileSizes) -> float:
    """Bytes of a stage that tensor cores read of shared memory: each instruction's two operands, the first 64 rows of it."""
    first, second = (tiles.n, tiles.m) if tiles.swapped else (tiles.m, tiles.n)
    # Expanded numbers come from registers.
    first_bytes = 0 if product.weight_bits < 16 and tiles.swapped else 2
    return product.halves * math.ceil(first / 64) * tiles.k * (64 * first_bytes + second * product.row_bytes)


def _result_cycles(product: Product, tiles: TileSizes, gpu: GPU, store_conflicts: int) -> float:
    """Cycles from the last product of a tile to the first of the next, which no product overlaps."""
    results = tiles.m * tiles.n
    instructions = RESULT_INSTRUCTIONS + (ACTIVATION_INSTRUCTIONS if product.halves == 2 else 0)
    stores = results * product.out_bytes / SHARED_BYTES * store_conflicts
    return results * instructions / gpu.fp32_units + stores + TILE_CYCLES


@lru_cache(maxsize=4096)
def count_row_tiles(sizes: tuple[int, ...], m: int) -> int:
    """Tiles of `m` rows over groups of those sizes, each of which begins with a block of 8 rows.

    >>> count_row_tiles((0, 9, 16), 16)
    3
    """
    ends = itertools.accumulate(sizes)
    return sum(
        math.ceil((end - (end - size) // _ALIGNMENT * _ALIGNMENT) / m)
        for size, end in zip(sizes, ends, strict=True)
        if size
    )


def memory_bytes(product: Product, tiles: TileSizes, gpu: GPU) -> float:
    """Bytes that memory reads and writes: rows, results, and matrices as often as the cache has lost them.

    A group's matrices are read once where they stay in the cache, or where one band has all of the group's row tiles, and
    else once for each band of them. A band's rows are read once where they stay in the cache, and else once for the columns
    of tiles that run together.
    """
    kept = gpu.l2_cache * CACHE_KEPT
    rows = product.rows * product.K * product.row_bytes
    results = product.rows * product.N * product.out_bytes
    if tiles.splits > 1:  # written by part, and read to be added up
        results *= 2 * tiles.splits
    if min(tiles.band * tiles.m, product.rows) * product.K * product.row_bytes > kept:
        together = max(1, gpu.multiprocessors // tiles.band)
        rows *= math.ceil(math.ceil(product.N / tiles.n) / together)
    read = sum(
        count * (min(bands, 1) if product.matrix_bytes <= kept else bands)
        for size, count in Counter(product.sizes).items()
        for bands in [math.ceil(count_row_tiles((size,), tiles.m) / tiles.band)]
    )
    return rows + results + product.matrix_bytes * read


def likely_sizes(tokens: int, per_token: int, groups: int) -> tuple[int, ...]:
    """Rows of each group as even routing is likely to give them: the quantiles of what one group gets, a binomial.

    Args:
        tokens: tokens.
        per_token: groups that a token goes to.
        groups: groups.

    >>> likely_sizes(2, 1, 4), sum(likely_sizes(4096, 8, 128))
    ((0, 0, 1, 1), 32768)
    """
    share = per_token / groups
    if share >= 1:
        return (tokens,) * groups
    sizes, size = [], 0
    chance = below = math.exp(tokens * math.log1p(-share)) if tokens * share < 700 else 0.0
    if not chance:  # too many rows for that: near their mean a normal distribution is as good
        return _with_sum(_normal_quantiles(tokens, share, groups), tokens * per_token)
    for group in range(groups):
        while below < (group + 0.5) / groups and size < tokens:
            chance *= (tokens - size) / (size + 1) * share / (1 - share)
            size += 1
            below += chance
        sizes.append(size)
    return _with_sum(sizes, tokens * per_token)


def skewed_sizes(rows: int, groups: int) -> tuple[int, ...]:
    """Rows of each group where the i-th busiest has them in proportion to i^-1.2.

    >>> skewed_sizes(100, 4)
    (53, 23, 14, 10)
    """
    ends = list(itertools.accumulate((i + 1) ** -1.2 for i in range(groups)))
    until = [0, *(round(rows * end / ends[-1]) for end in ends)]
    return tuple(after - before for before, after in itertools.pairwise(until))


def _normal_quantiles(tokens: int, share: float, groups: int) -> list[int]:
    from statistics import NormalDist

    normal = NormalDist(tokens * share, math.sqrt(tokens * share * (1 - share)))
    return [max(0, round(normal.inv_cdf((group + 0.5) / groups))) for group in range(groups)]


def _with_sum(sizes: list[int], total: int) -> tuple[int, ...]:
    """The same sizes, the largest of them changed by one until they add up."""
    missing, place = total - sum(sizes), len(sizes) - 1
    while missing:
        step = 1 if missing > 0 else -1
        if sizes[place] + step >= 0:
            sizes[place] += step
            missing -= step
        place = place - 1 if place else len(sizes) - 1
    return tuple(sorted(sizes))


Sizes = TypeVar("Sizes", bound=TileSizes)


def fastest(candidates: Iterable[Sizes], product: Product, gpu: GPU, *, most: int) -> list[Sizes]:
    """The candidates with the least predicted time, in that order; among those that memory bounds, the least on the chip.

    Args:
        candidates: sizes of tiles.
        product: product that they are for.
        gpu: kind of GPU.
        most: number of candidates.
    """

    def cost(tiles: Sizes) -> tuple[float, float]:
        found = predict(product, tiles, gpu)
        return found.seconds, found.on_chip

    return sorted(candidates, key=cost)[:most]
