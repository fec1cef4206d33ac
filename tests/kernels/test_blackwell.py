"""The Blackwell kernel in Mosaic GPU's interpreter: what test_mosaic_gpu says of it holds here as well.

Of tensor memory the interpreter knows neither the layout nor the size: tests/aot does.
"""

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.kernels.grouped_matmul import expert_mlp, grouped_matmul
from tests.support.kernels import (
    FLOAT32,
    MLPS,
    SIZES,
    check_mlp,
    check_product,
    needs_mosaic,
    packed_stack,
    rows_and_matrices,
    widths_of_single_rows,
)

pytestmark = [needs_mosaic, pytest.mark.covering(most=3)]
DEVICE = "NVIDIA B200"


def tiles_of(m, **sizes):
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import Tiles

    return Tiles(**({"m": m, "n": 128, "k": 32, "stages": 2, "swapped": True, "band": 2} | sizes))


def problem_of(halves=1, N=136, K=96, R=64, G=1):
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    rows, matrices = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((R, K), (G, halves * N, K)))
    return mosaic_gpu.problem_of(rows, matrices, halves, FLOAT32, DEVICE)


# One piece of results a tile, and several.
@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("m", "N", "dtype"), [(16, 136, jnp.bfloat16), (128, 192, jnp.float16)])
@pytest.mark.parametrize(("sizes", "R"), SIZES, ids=str)
def test_product(sizes, R, m, N, dtype) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    check_product(mosaic_gpu, sizes, R, N, dtype, tiles=tiles_of(m), device_kind=DEVICE, interpret=True)


@pytest.mark.full
@pytest.mark.parametrize("m", [16, 64])
@pytest.mark.parametrize(("activation", "limit", "gated"), MLPS)
def test_mlp_with_biases(activation, limit, gated, m) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    tiles = (tiles_of(m), tiles_of(2 * m))
    check_mlp(mosaic_gpu, activation, limit, gated, tiles=tiles, device_kind=DEVICE, interpret=True)


@pytest.mark.full
def test_single_rows_end_with_the_matrix(monkeypatch) -> None:
    assert widths_of_single_rows(136, tiles_of(16), monkeypatch, device_kind=DEVICE) == {128, 8}


def test_names() -> None:
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import blackwell_tiles

    others = ["NVIDIA H100 80GB HBM3", "NVIDIA GeForce RTX 5090", "NVIDIA GB10", "NVIDIA RTX PRO 6000 Blackwell", "cpu"]
    assert not any(map(blackwell_tiles.is_blackwell, others))
    kinds = ["NVIDIA B100", "NVIDIA B200", "NVIDIA GB200", "NVIDIA B300 SXM6 AC", "NVIDIA GB300"]
    assert all(map(blackwell_tiles.is_blackwell, kinds))


@pytest.mark.parametrize("device_kind", ["NVIDIA H100 80GB HBM3", DEVICE, None])
def test_the_device_chooses_the_kernel(device_kind) -> None:
    arguments = (*rows_and_matrices(16, (1, 64, 64), dtype=jnp.bfloat16), jnp.asarray([16], jnp.int32))
    jaxpr = jax.make_jaxpr(lambda *args: grouped_matmul(*args, backend="mosaic_gpu", device_kind=device_kind))(
        *arguments
    )
    assert ("tcgen05_mma" in str(jaxpr), "wgmma" in str(jaxpr)) == (device_kind == DEVICE, device_kind != DEVICE)


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        ({"k": 64}, "k must divide 96; got .*: use 32"),
        ({"swapped": False}, r"on Blackwell tiles are swapped, m is one of \[16, 32, 64, 128\] and n is 128"),
        ({"n": 256}, "on Blackwell tiles are swapped"),
        ({"m": 256}, r"m is one of \[16, 32, 64, 128\]"),
        ({"m": 24}, r"m is one of \[16, 32, 64, 128\]"),
        ({"splits": 3}, r"splits must be one of \(1,\) here"),
        ({"stages": 0}, "stages must be 1 at least, and band 1"),
        ({"stages": 20}, "need 366592 bytes of shared memory, of 232448"),
    ],
    ids=str,
)
def test_tiles_that_are_refused(tiles, message) -> None:
    with pytest.raises(ValueError, match=message):
        problem_of(halves=2).check(tiles_of(**({"m": 16} | tiles)))


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("rows", [1, 8, 30, 100, 4096])
def test_chosen_tiles_fit(rows, halves) -> None:
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import candidate_tiles, choose_tiles

    for N, K in [(14336, 4096), (768, 2048), (1440, 2880), (136, 96)]:
        problem = problem_of(halves, N, K, R=16 * rows, G=16)
        chosen, *others = candidate_tiles(problem)
        assert chosen == choose_tiles(problem)
        assert chosen.m == {1: 16, 8: 16, 30: 64, 100: 256 // halves, 4096: 256 // halves}[rows]
        assert chosen.stages > 1
        assert {tiles.m for tiles in others} >= {16, 32, 64, 128} - {chosen.m}
        for tiles in (chosen, *others):
            problem.check(tiles)


def test_packed_matrices_are_refused() -> None:
    sizes, [rows] = jnp.asarray([8], jnp.int32), [rows_and_matrices(8, (1, 128), dtype=jnp.bfloat16)[0]]
    packed = packed_stack("mxfp4", (1, 32), "uint8", 1, 64, 128)
    options = {"backend": "mosaic_gpu", "device_kind": DEVICE}
    message = r"takes no packed matrices on Blackwell \(NVIDIA B200\), here mxfp4: use the portable one"
    with pytest.raises(NotImplementedError, match=message):
        grouped_matmul(rows, packed, sizes, **options)
    up = jax.tree.map(lambda array: array[:, None], packed)
    with pytest.raises(NotImplementedError, match=message):
        expert_mlp(rows, up, packed_stack("mxfp4", (1, 32), "uint8", 1, 128, 64), sizes, **options)
    with pytest.raises(NotImplementedError, match="multiplies rows of bfloat16 and float16; got float32"):
        grouped_matmul(rows.astype(jnp.float32), jnp.ones((1, 64, 128)), sizes, **options)
