"""Clusters of two blocks of the Hopper kernel that read their rows once for both, in Mosaic GPU's interpreter.

By itself it has each block copy all rows; `tests.support.multicast` has one half come from the neighbor, as on a GPU, and
one of the blocks late. Only a GPU shows the hardware's barriers between two multiprocessors, and what there is to gain.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.kernels import FLOAT32, check_mlp, check_product, int32, needs_mosaic, poison, rows_and_matrices
from tests.support.multicast import Multicast

pytestmark = needs_mosaic

# Groups, some empty, of less than a tile and of several, none at a multiple of 8; the last rows belong to none.
SIZES = [([5, 0, 40, 1], 51), ([0, 0], 16), ([3, 1], 4)]


def tiles_of(swapped, **sizes):
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import Tiles

    few = {"m": 16, "n": 128, "k": 16, "stages": 2, "swapped": True, "band": 2, "cluster": 2}
    many = {"m": 128, "n": 64, "k": 32, "stages": 2, "band": 1, "cluster": 2}
    return Tiles(**((few if swapped else many) | sizes))


# Outputs: an odd number of tiles, an even one whose last sticks out, and one tile, whose neighbor is beyond the matrix.
CASES = [
    (True, 384, SIZES[0]),
    (True, 136, SIZES[2]),
    (True, 128, SIZES[0]),
    (True, 256, SIZES[1]),
    (False, 192, ([5, 0, 130, 1], 141)),
    (False, 128, SIZES[2]),
]


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("late_block", [0, 1])
@pytest.mark.parametrize(("swapped", "N", "groups"), CASES, ids=str)
def test_rows_that_come_from_both_blocks(swapped, N, groups, late_block, monkeypatch) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    tiles = tiles_of(swapped)
    multicast = Multicast(monkeypatch, tiles.m, late_block)
    check_product(mosaic_gpu, *groups, N, jnp.bfloat16, tiles=tiles, interpret=True)
    # Each block has had as many halves from the other as from itself.
    assert len(set(multicast.halves.values())) == (1 if sum(groups[0]) else 0)
    assert len(multicast.halves) == (4 if sum(groups[0]) else 0)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("swapped", [True, False], ids=["few rows", "many rows"])
def test_results_are_those_of_blocks_alone(swapped) -> None:
    """Bit for bit, with a band that ends amid the row tiles and more stages than a tile has."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    sizes, R, N = ([9, 0, 60], 72, 384) if swapped else ([9, 0, 250], 264, 192)
    rows, matrices = rows_and_matrices(R, (3, N, 64), dtype=jnp.bfloat16)
    rows = poison(rows, sizes)
    tiles = tiles_of(swapped, k=32, stages=3, band=3 if swapped else 2)
    together, alone = (
        mosaic_gpu.grouped_matmul(
            rows,
            matrices,
            int32(sizes),
            out_dtype=FLOAT32,
            tiles=dataclasses.replace(tiles, cluster=size),
            interpret=True,
        )
        for size in (2, 1)
    )
    np.testing.assert_array_equal(together, alone)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("swapped", [True, False], ids=["few rows", "many rows"])
def test_mlp_with_biases(swapped, monkeypatch) -> None:
    """64 outputs, of which the second block has none, nor biases."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    tiles = tiles_of(swapped, k=32)
    Multicast(monkeypatch, tiles.m, late_block=1)
    check_mlp(mosaic_gpu, "silu", None, gated=True, tiles=(tiles, tiles), interpret=True)


@pytest.mark.parametrize("cluster", [1, 2])
def test_only_rows_are_shared(cluster, monkeypatch) -> None:
    """And only where there is a cluster, whose blocks both have to give a stage back."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import pipeline

    shared, emptied = [], []
    copy, barrier = pipeline.plgpu.copy_gmem_to_smem, pipeline.plgpu.ClusterBarrier

    def recorded(source, target, arrival, *, collective_axes=None, **more):
        shared.append((target.shape, collective_axes))
        copy(source, target, arrival, collective_axes=collective_axes, **more)

    monkeypatch.setattr(pipeline.plgpu, "copy_gmem_to_smem", recorded)
    monkeypatch.setattr(pipeline.plgpu, "ClusterBarrier", lambda **more: (emptied.append(more), barrier(**more))[1])
    rows, matrices = rows_and_matrices(24, (2, 256, 48), dtype=jnp.bfloat16)
    # In this test alone, so that the kernel is traced here.
    tiles = tiles_of(True, stages=3, cluster=cluster)
    options = {"out_dtype": FLOAT32, "tiles": tiles, "interpret": True}
    jax.eval_shape(lambda *args: mosaic_gpu.grouped_matmul(*args, **options), rows, matrices, int32([3, 8]))
    axis = "neighbors" if cluster == 2 else None
    assert set(shared) == {((16, 16), axis), ((128, 16), None)}
    expected = {"collective_axes": ("neighbors",), "num_arrivals": 2, "num_barriers": 3}
    assert emptied == ([expected] if cluster == 2 else [])


def test_tiles_that_have_no_clusters_are_refused() -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    rows, matrices = rows_and_matrices(16, (1, 128, 96), dtype=jnp.bfloat16)
    problem = mosaic_gpu.problem_of(rows, matrices, 1, FLOAT32)
    problem.check(tiles_of(True))
    packed = dataclasses.replace(problem, K=128, block=(1, 32), weight_bits=8)
    # Halves of 12 rows are no whole swizzles; parts have too few tiles; packed matrices are read by threads.
    for wrong, tiles in (
        (problem, tiles_of(True, m=24)),
        (problem, tiles_of(True, splits=2)),
        (packed, tiles_of(True, k=32)),
        (problem, tiles_of(True, cluster=4)),
        (problem, tiles_of(True, cluster=0)),
    ):
        allowed = r"\(1, 2\)" if tiles.cluster != 2 else r"\(1,\)"
        with pytest.raises(ValueError, match=rf"cluster must be one of {allowed} here; got Tiles.*cluster="):
            wrong.check(tiles)
    with pytest.raises(ValueError, match=r"cluster must be one of \(1,\) here"):
        mosaic_gpu.grouped_matmul(
            rows, matrices, int32([16]), out_dtype=FLOAT32, tiles=tiles_of(True, m=8), interpret=True
        )
    blackwell = mosaic_gpu.problem_of(rows, matrices, 1, FLOAT32, "NVIDIA B200")
    with pytest.raises(ValueError, match=r"cluster must be one of \(1,\) here"):
        blackwell.check(tiles_of(True, k=32))
