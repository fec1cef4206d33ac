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
            # Swapped tiles are written out whole, others by 128 bytes of a row, at least one piece at a time.
            results = tiles.m * (tiles.n * problem.out_bytes if tiles.swapped else 128)
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


@pytest.mark.parametrize("out_bytes", [2, 4], ids=["16 bits", "float32"])
@pytest.mark.parametrize(("G", "D", "F"), PUBLISHED.values(), ids=PUBLISHED)
def test_four_stages_are_under_way_at_published_shapes(G, D, F, out_bytes):
    """A stage lasts some 1,000 cycles and its refill 1,400: two stages leave the tensor cores waiting."""
    for rows in (1, 8, 32, 65, 128, 1024, 8192):
        up = Problem(R=rows * G, G=G, halves=2, N=F, K=D)
        down = Problem(R=rows * G, G=G, halves=1, N=D, K=F, out_bytes=out_bytes)
        assert choose_tiles(up).stages >= 4
        assert choose_tiles(down).stages >= 4
        if rows > 64:
            assert choose_tiles(down).n == 256
