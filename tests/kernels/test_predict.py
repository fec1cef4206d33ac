"""The model of a product's time: what it counts is what the kernel does, and what it says follows from the right fact."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul.predict import (
    Product,
    count_row_tiles,
    fastest,
    likely_sizes,
    memory_bytes,
    predict,
)
from tests.support.group_tiles import row_tiles

H100 = GPUS["h100"]
FEW = SimpleNamespace(m=16, n=128, k=64, stages=6, band=8, swapped=True, splits=1, cluster=1)
MANY = SimpleNamespace(m=128, n=128, k=64, stages=4, band=8, swapped=False, splits=1, cluster=1)
QWEN_DOWN = Product(sizes=likely_sizes(4096, 8, 128), halves=1, N=2048, K=768, out_bytes=4)
QWEN_UP = Product(sizes=QWEN_DOWN.sizes, halves=2, N=768, K=2048)


def changed(tiles, **sizes):
    return SimpleNamespace(**vars(tiles) | sizes)


@pytest.mark.parametrize("m", [16, 128])
def test_tiles_are_as_many_as_the_kernel_has(m) -> None:
    rng = np.random.default_rng(m)
    for sizes in ([0] * 9, [8, 0, 1] + [0] * 6, *rng.integers(0, 200, (5, 9)).tolist()):
        assert count_row_tiles(tuple(sizes), m) == len(row_tiles(sizes, 9 * 200, m)), sizes


@pytest.mark.parametrize(
    ("tokens", "per_token", "groups"), [(1, 8, 128), (32, 8, 128), (3, 4, 4), (7, 1, 1), (16384, 2, 8)]
)
def test_likely_sizes_are_those_of_even_routing(tokens, per_token, groups) -> None:
    sizes = likely_sizes(tokens, per_token, groups)
    assert (len(sizes), sum(sizes)) == (groups, tokens * per_token)
    assert max(sizes) <= tokens
    # As many groups have rows as even routing touches, and their number varies as it does there.
    share = per_token / groups
    assert sum(size > 0 for size in sizes) == pytest.approx(groups * (1 - (1 - share) ** tokens), abs=1.5)
    assert np.var(sizes) == pytest.approx(tokens * share * (1 - share), rel=0.3, abs=0.1)


def test_bound_by_memory_it_takes_as_long_as_the_matrices() -> None:
    decode = dataclasses.replace(QWEN_UP, sizes=likely_sizes(32, 8, 128))
    found = predict(decode, FEW, H100)
    touched = sum(size > 0 for size in decode.sizes)
    assert found.bound == "memory"
    assert found.nbytes == pytest.approx(touched * decode.matrix_bytes, rel=0.01)
    assert found.seconds == pytest.approx(found.nbytes / 3.0e12, rel=0.06)
    # Twice the bytes a second, and packed matrices, are felt.
    assert predict(decode, FEW, GPUS["h200"]).seconds < 0.75 * found.seconds
    assert predict(dataclasses.replace(decode, weight_bits=8), FEW, H100).nbytes == pytest.approx(
        found.nbytes / 2, rel=0.01
    )


def test_bound_by_products_it_follows_the_tensor_cores() -> None:
    wide = changed(MANY, n=256)
    product = dataclasses.replace(QWEN_DOWN, K=4096, out_bytes=2, sizes=(4096,) * 8)
    found = predict(product, changed(wide, stages=4), GPUS["h20"])
    assert found.bound == "products"
    assert found.seconds == pytest.approx(product.flops / (148e12 * 798 / 989), rel=0.1)
    assert predict(product, changed(wide, stages=4), H100).seconds < found.seconds / 4


def test_few_stages_are_waited_for() -> None:
    two, four = (predict(QWEN_UP, changed(FEW, stages=stages, m=64), H100) for stages in (2, 4))
    assert (two.bound, two.parts["latency"]) == ("latency", pytest.approx(3 * four.parts["latency"]))
    assert four.seconds < two.seconds


def test_results_without_conflicts_are_worth_what_was_expected() -> None:
    """Down of Qwen3-30B, whose inner dimension is short: a quarter of the time, by the arithmetic of the design."""
    tiles = changed(MANY, n=256, stages=2)
    with_conflicts, without = (predict(QWEN_DOWN, tiles, H100, store_conflicts=ways).on_chip for ways in (8, 1))
    assert 0.15 < 1 - without / with_conflicts < 0.35


def test_idle_multiprocessors_cost() -> None:
    """One token: 48 of 132 work, and no wider memory helps; more and narrower tiles do."""
    one_token = dataclasses.replace(QWEN_UP, sizes=likely_sizes(1, 8, 128))
    found = predict(one_token, FEW, H100)
    assert (found.tiles, found.waves) == (48, 1)
    more_work = predict(one_token, changed(FEW, n=64), H100)
    assert (more_work.tiles, more_work.parts["cache"] < found.parts["cache"]) == (96, True)
    fewer = dataclasses.replace(H100, multiprocessors=24)
    assert predict(one_token, FEW, fewer).waves == 2


def test_parts_of_the_inner_dimension_have_more_multiprocessors_read() -> None:
    """One row of DeepSeek-V3: twice as many outputs of gate and up as one matrix, each in two parts."""
    product = Product(sizes=(1,), halves=2, N=2048, K=7168)
    whole, parts = (predict(product, changed(FEW, splits=splits), H100) for splits in (1, 2))
    assert (whole.tiles, parts.tiles) == (16, 64)
    assert parts.on_chip < 0.4 * whole.on_chip
    assert parts.parts["launch"] - whole.parts["launch"] == pytest.approx(2e-6)
    # Each part is written and read in float32.
    assert parts.nbytes - whole.nbytes == 2 * 2 * 2 * 2048 * 4 - 2048 * 2


def test_clusters_take_their_rows_from_the_cache_once() -> None:
    """A third of what a tile of 128 rows by 256 outputs loads are rows, so a sixth is saved; all of it passes the port."""
    wide = changed(MANY, n=256)
    alone, together = (predict(QWEN_DOWN, changed(wide, cluster=blocks), H100) for blocks in (1, 2))
    assert (alone.tiles, alone.waves) == (together.tiles, together.waves)
    assert together.parts["cache"] == pytest.approx(alone.parts["cache"] * 5 / 6)
    fast = dataclasses.replace(QWEN_DOWN, sizes=(1,))  # so few blocks that the port bounds each
    alone, together = (predict(fast, changed(wide, cluster=blocks), H100) for blocks in (1, 2))
    assert alone.parts["cache"] == together.parts["cache"]


def test_clusters_cost_what_they_wait_for() -> None:
    """Blocks in pairs have a tile each, be it beyond the matrix, and wait for each other's stages and results."""
    narrow = dataclasses.replace(QWEN_DOWN, N=3 * 128)
    alone, together = (predict(narrow, changed(MANY, cluster=blocks), H100) for blocks in (1, 2))
    assert together.tiles == 4 / 3 * alone.tiles
    alone, together = (predict(QWEN_DOWN, changed(MANY, cluster=blocks), H100) for blocks in (1, 2))
    assert together.parts["latency"] == pytest.approx(1600 / 1400 * alone.parts["latency"])
    cycles = (together.parts["results"] - alone.parts["results"]) * H100.clock_ghz * 1e9
    assert cycles == pytest.approx(200 * together.waves)
    odd = dataclasses.replace(H100, multiprocessors=131)
    assert (
        predict(QWEN_DOWN, changed(MANY, cluster=2), odd).waves
        == predict(QWEN_DOWN, MANY, dataclasses.replace(H100, multiprocessors=130)).waves
    )


def test_matrices_are_read_again_where_the_cache_has_lost_them() -> None:
    kept, lost = (Product(sizes=(4096,), halves=1, N=N, K=4096, out_bytes=2) for N in (1024, 16384))
    for product, times in ((kept, 1), (lost, 4)):
        others = product.rows * (product.K + product.N) * 2
        assert memory_bytes(product, MANY, H100) == others + times * product.matrix_bytes
    # Wider bands take them fewer times, until their own rows have no room any more.
    once, twice, four = (memory_bytes(lost, changed(MANY, band=band), H100) for band in (32, 16, 8))
    assert twice < four < once


def test_the_fastest_come_first() -> None:
    tiles = [changed(FEW, stages=stages, m=64, band=band) for stages in (2, 4) for band in (1, 8)]
    best = fastest(tiles, QWEN_UP, H100, most=2)
    assert [each.stages for each in best] == [4, 4]
    assert best[0] in tiles


def test_without_rows_there_is_but_the_launch() -> None:
    found = predict(Product(sizes=(0, 0), halves=1, N=64, K=64), FEW, H100)
    assert (found.tiles, found.waves, found.bound) == (0, 0, "launch")
