"""The choice of tiles where none were measured, by what a problem says that they cost: on Hopper, a model of their time."""

import dataclasses
import itertools
from functools import lru_cache

from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import Problem, Tiles

# Candidates for a measurement that differ in their rows alone.
_ROW_SIZES = 5
# The part of the time of other tiles that those in clusters may take: what the model cannot tell apart is not worth that
# two blocks wait for each other.
_WORTH_CLUSTERS = 0.97
# Rows of a tile from which clusters are tried: of fewer there is little to read once.
_LEAST_ROWS_OF_CLUSTERS = 64
# Rows of a tile up to which parts of the inner dimension are tried: with more there are tiles enough.
_MOST_ROWS_OF_PARTS = 32


@lru_cache
def choose_tiles(problem: Problem) -> Tiles:
    """The tiles that work and cost the least; nothing of it has been measured.

    Raises:
        NotImplementedError: N or K is no multiple of what the kernel copies at a time.
    """
    working = _working_tiles(problem)
    alone = min((tiles for tiles in working if tiles.cluster == 1), key=problem.cost)
    clustered = min((tiles for tiles in working if tiles.cluster > 1), key=problem.cost, default=alone)
    late, seconds, *_ = problem.cost(clustered)
    late_alone, seconds_alone, *_ = problem.cost(alone)
    return clustered if (late, seconds) < (late_alone, _WORTH_CLUSTERS * seconds_alone) else alone


def candidate_tiles(problem: Problem) -> list[Tiles]:
    """Tiles that are worth timing: what `choose_tiles` gives, that in other bands, the best of each n and k, and clusters.

    Raises:
        NotImplementedError: as of `choose_tiles`.
    """
    chosen = choose_tiles(problem)
    kinds: dict[tuple[int, ...], list[Tiles]] = {}
    for tiles in sorted(_working_tiles(problem), key=problem.cost):
        kind = () if tiles.cluster > 1 else (tiles.swapped, tiles.n, tiles.k, tiles.splits > 1)
        kinds.setdefault(kind, []).append(tiles)
    best = (tiles for kind in kinds.values() for tiles in kind[:_ROW_SIZES])
    banded = (dataclasses.replace(chosen, band=band) for band in (1, 16))
    return list(dict.fromkeys([chosen, *banded, *best]))


def _working_tiles(problem: Problem) -> list[Tiles]:
    tiles: list[Tiles] = []
    for k in problem.inner_sizes:
        for m, n in itertools.product(problem.row_sizes, problem.column_sizes):
            splits = problem.split_sizes(k) if m <= _MOST_ROWS_OF_PARTS else (1,)
            tiles += [Tiles(m=m, n=n, k=k, stages=1, swapped=True, splits=parts) for parts in splits]
        if problem.rows_may_lead:
            tiles += [Tiles(m=m, n=n, k=k, stages=1) for m, n in itertools.product((128, 256), (64, 128, 192, 256))]
    working = [each for each in (with_stages(problem, each) for each in tiles) if problem.works(each)]
    wide = [each for each in working if each.m >= _LEAST_ROWS_OF_CLUSTERS]
    return working + [dataclasses.replace(each, cluster=size) for each in wide for size in problem.clusters(each)[1:]]


def with_stages(problem: Problem, tiles: Tiles) -> Tiles:
    """As many stages as fit and as there is work for, up to 8."""
    counts = (count for count in range(min(8, problem.steps(tiles)), 1, -1))
    staged = (dataclasses.replace(tiles, stages=count) for count in counts)
    return next((tiles for tiles in staged if problem.fits(tiles)), tiles)
