"""Tiles that are chosen, or worth timing, on Hopper: what they divide, and the shared memory that they take."""

import itertools

import pytest

from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import Problem, candidate_tiles, choose_tiles

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
            stage = tiles.m * tiles.k * problem.row_bytes + halves * tiles.n * tiles.k * problem.weight_bits / 8
            # 227 KiB, less some for barriers.
            assert tiles.stages * stage + tiles.m * tiles.n * problem.out_bytes <= 227 * 1024 - 1024
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
