"""Tiles that are chosen, or worth timing, on Hopper: what they divide, and the shared memory that they take."""

import dataclasses
import itertools

import pytest

from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.choice import candidate_tiles, choose_tiles
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import Problem
from jaxmoe.kernels.grouped_matmul.predict import Product, count_row_tiles, likely_sizes, predict
from jaxmoe.kernels.grouped_matmul.trial import WIDE, WIDE_GRADIENT

SIZES = [(2048, 768), (4096, 14336), (2880, 2880), (1024, 64)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_tiles_fit_a_block(N, K, packed):
    for rows, halves in itertools.product((1, 17, 60, 65, 4000), (1, 2)):
        weights = {"weight_bits": 4, "block": (1, 32)} if packed else {}
        problem = Problem(R=8 * rows, G=8, halves=halves, N=N, K=K, **weights)
        candidates = candidate_tiles(problem)
        assert choose_tiles(problem) in candidates
        for tiles in candidates:
            # Parts of the inner dimension are of gate and up as one matrix, in float32.
            matrices, out_bytes = (halves, problem.out_bytes) if tiles.splits == 1 else (1, 4)
            stage = tiles.m * tiles.k * problem.row_bytes + matrices * tiles.n * tiles.k * problem.weight_bits / 8
            # 227 KiB, less some for barriers.
            # Swapped tiles are written out whole, others by 128 bytes of a row, at least one piece at a time.
            results = tiles.m * (tiles.n * out_bytes if tiles.swapped else 128)
            assert tiles.stages * stage + results <= 227 * 1024 - 1024
            assert K % tiles.k == 0
            problem.check(tiles)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(("N", "K"), SIZES)
def test_tiles_of_wide_rows_work(N, K, bits):
    """Numbers of 4 bytes leave room for one stage of the largest tiles, where two are needed."""
    for rows, halves in itertools.product((1, 60, 65, 4000), (1, 2)):
        problem = Problem(R=8 * rows, G=8, halves=halves, N=N, K=K, row_bytes=4, out_bytes=4, weight_bits=bits)
        candidates = candidate_tiles(problem)
        assert candidates[0] == choose_tiles(problem)
        for tiles in candidates:
            problem.check(tiles)


# Slots on a device, model width and expert width of published models, whole or cut.
PUBLISHED = {
    "mixtral-8x7b": (8, 4096, 14336),
    "mixtral-8x22b": (8, 6144, 16384),
    "qwen3-30b": (128, 2048, 768),
    "qwen3-235b, ep 8": (16, 4096, 1536),
    "deepseek-v3, ep 8": (32, 7168, 2048),
    "gpt-oss-20b": (32, 2880, 2880),
    "gpt-oss, tp 2": (32, 2880, 1440),
    "minimax-m2, ep 8": (32, 3072, 1536),
    "nemotron-3-nano, ep 8": (16, 2688, 1856),
}


@pytest.mark.parametrize(("G", "D", "F"), PUBLISHED.values(), ids=PUBLISHED)
def test_no_stage_is_waited_for_at_published_shapes(G, D, F):
    """A stage lasts some 1,000 cycles and its refill 1,400: two stages leave the tensor cores waiting."""
    for rows in (1, 8, 32, 65, 128, 1024, 8192):
        up = Problem(R=rows * G, G=G, halves=2, N=F, K=D)
        downs = [Problem(R=rows * G, G=G, halves=1, N=D, K=F, out_bytes=out_bytes) for out_bytes in (2, 4)]
        for problem in (up, *downs):
            tiles = choose_tiles(problem)
            assert tiles.stages >= 3
            product = Product(
                sizes=(rows,) * G, halves=problem.halves, N=problem.N, K=problem.K, out_bytes=problem.out_bytes
            )
            assert predict(product, tiles, GPUS["h100"]).bound != "latency"
            if rows >= 1024:
                # As many sums as registers hold, of both blocks where rows are loaded once for two: each number that is
                # loaded is multiplied as often as can be.
                least = (144 if problem is up else 128) * 256
                assert problem.halves * tiles.m * tiles.n * tiles.cluster >= least


@pytest.mark.parametrize(("T", "filled"), [(4096, 0.85), (16384, 0.9)])
def test_tiles_are_filled_where_products_bound(T, filled):
    """Rows of Qwen3-30B's gate and up by those of its tiles; of 128 rows each they were 77 % at 4096 tokens."""
    sizes = likely_sizes(T, 8, 128)
    m = choose_tiles(Problem(R=8 * T, G=128, halves=2, N=768, K=2048)).m
    assert sum(sizes) / (m * count_row_tiles(sizes, m)) > filled


def test_one_busy_group_counts():
    """Tiles of 8 rows suit groups of one row each, but many of them would read the matrix of a busy one."""
    assert choose_tiles(Problem(R=32, G=32, halves=2, N=2048, K=7168)).m == 16


def test_the_inner_dimension_is_shared_out_where_multiprocessors_idle():
    """One row of DeepSeek-V3's has 16 tiles of 128 gates and ups; of Mixtral's two rows there are more than enough."""
    few, enough = (
        choose_tiles(Problem(R=rows, G=G, halves=2, N=F, K=D))
        for rows, G, D, F in ((1, 32, 7168, 2048), (2, 8, 4096, 14336))
    )
    assert few.splits > 1
    assert enough.splits == 1
    assert choose_tiles(Problem(R=4096, G=32, halves=2, N=2048, K=7168)).splits == 1


def test_clusters_are_chosen_where_the_cache_would_bound_and_not_for_less():
    """Down of Mixtral; not gate and up, which products bound, nor a decode; and by 3 % of the time or more."""
    names = {"mixtral": (8, 4096, 14336, 2), "qwen3-30b": (128, 2048, 768, 8)}
    chosen = {}
    for (name, (G, D, F, K)), T in itertools.product(names.items(), (32, 16384)):
        problems = Problem(R=T * K, G=G, halves=2, N=F, K=D), Problem(R=T * K, G=G, halves=1, N=D, K=F, out_bytes=4)
        chosen[name, T] = [choose_tiles(problem).cluster for problem in problems]
        for problem in problems:
            times = {size: problem.cost(best_of(problem, size))[1] for size in (1, 2)}
            assert (choose_tiles(problem).cluster == 2) == (times[2] < 0.97 * times[1]), (name, T, times)
    assert chosen == {
        ("mixtral", 32): [1, 1],
        ("mixtral", 16384): [1, 2],
        ("qwen3-30b", 32): [1, 1],
        ("qwen3-30b", 16384): [1, 1],
    }


def best_of(problem, cluster):
    return min((tiles for tiles in candidate_tiles(problem) if tiles.cluster == cluster), key=problem.cost)


def test_clusters_are_no_choice_for_packed_matrices():
    problem = Problem(R=32768, G=8, halves=1, N=4096, K=14336, out_bytes=4)
    packed = dataclasses.replace(problem, weight_bits=8, block=(128, 128), format="float8_e4m3fn")
    assert {tiles.cluster for tiles in candidate_tiles(problem)} == {1, 2}
    assert {tiles.cluster for tiles in candidate_tiles(packed)} == {1}


@pytest.mark.parametrize(("D", "F"), [shape[1:] for shape in PUBLISHED.values()], ids=PUBLISHED)
def test_a_trial_has_clusters_where_a_layer_may(D, F):
    """What a GPU makes of them is found out before a layer depends on it, with more tiles than it has multiprocessors."""

    def products(R, groups):
        down = [Problem(R=R, G=groups, halves=1, N=D, K=F, out_bytes=size) for size in (2, 4)]
        return [Problem(R=R, G=groups, halves=2, N=F, K=D), *down]

    def clusters(R, groups):
        return any(choose_tiles(problem).cluster == 2 for problem in products(R, groups))

    for case in (WIDE, WIDE_GRADIENT):
        assert clusters(case.total, len(case.sizes)), case
    for problem in products(WIDE.total, len(WIDE.sizes)):
        tiles = choose_tiles(problem)
        rows = [size * WIDE.copies for size in WIDE.sizes]
        found = Product(sizes=tuple(rows), halves=problem.halves, N=problem.N, K=problem.K)
        assert tiles.cluster == 1 or predict(found, tiles, GPUS["h100"]).waves > 1


def test_tiles_differ_in_what_is_measured():
    """Of each width of outputs and of inner numbers some, so that a measurement tells what the model does not know."""
    candidates = candidate_tiles(Problem(R=32768, G=128, halves=1, N=768, K=2048))
    assert {tiles.k for tiles in candidates} == {64, 128}
    assert {tiles.n for tiles in candidates} == {64, 128, 192, 256}
    assert {tiles.band for tiles in candidates} == {1, 8, 16}
    assert len(candidates) < 60


def test_no_cluster_shares_gathered_rows():
    """Only the accelerator could write a row to both blocks; nor is a tile of the table taken that has a cluster."""
    problem = Problem(R=4096, G=8, halves=1, N=4096, K=14336, out_bytes=4)
    gathered = dataclasses.replace(problem, gathered=True)
    clustered = choose_tiles(problem)
    assert (clustered.cluster, choose_tiles(gathered).cluster) == (2, 1)
    assert {tiles.cluster for tiles in candidate_tiles(gathered)} == {1}
    assert (problem.fits(clustered), gathered.fits(clustered)) == (True, False)
    with pytest.raises(ValueError, match="cluster must be one of"):
        gathered.check(clustered)
