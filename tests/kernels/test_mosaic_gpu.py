"""The Hopper kernel in Mosaic GPU's interpreter, against products in float64.

The interpreter runs the kernel's threads, barriers and copies on the CPU. What it does not show, tests/aot does or nothing
does without a GPU: speed; registers; whether the accelerator can copy a tile of that layout (the interpreter copies
anything) and where a copy goes that reaches beyond the matrix (a test here has a model of it); wgmma with an operand in
registers, which it does not have and the kernel replaces there by shared memory; and the order of wgmma's asynchronous
products, which it computes at once. It is slow, so shapes are small.
"""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import MoEConfig
from jaxmoe.kernels.grouped_matmul import check_backend, expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.combine import CLAMPED, KERNEL_ACTIVATIONS, OF_EXPONENTIALS, combine_halves
from jaxmoe.kernels.grouped_matmul.quantized import as_matrices, dequantize
from jaxmoe.layers import MoE
from jaxmoe.numerics import ACTIVATIONS
from tests.support.kernels import (
    FLOAT32,
    MLPS,
    OLD,
    SIZES,
    check_mlp,
    check_product,
    exact,
    needs_mosaic,
    packed_stack,
    rows_and_matrices,
    widths_of_single_rows,
)
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=3)


def tiles_of(swapped, **sizes):
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import Tiles

    few = {"m": 16, "n": 128, "k": 32, "stages": 2, "swapped": True, "band": 2}
    many = {"m": 128, "n": 128, "k": 32, "stages": 3, "band": 2}
    return Tiles(**((few if swapped else many) | sizes))


@needs_mosaic
@pytest.mark.parametrize("swapped", [True, False], ids=["few rows", "many rows"])
@pytest.mark.parametrize(("sizes", "R"), SIZES, ids=str)
def test_product(sizes, R, swapped) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    # Outputs that are no multiple of a tile, as the 2880 of gpt-oss are none.
    N, dtype = (136, jnp.bfloat16) if swapped else (192, jnp.float16)
    # And rows of a tile that are no power of two, in which they are copied out; an odd number of pieces of a result.
    tiles = tiles_of(swapped, **({"m": 24} if swapped else {"n": 192}))
    check_product(mosaic_gpu, sizes, R, N, dtype, tiles=tiles, interpret=True)


@needs_mosaic
@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)])
def test_parts_of_the_inner_dimension_add_up(dtype) -> None:
    """Outputs of a tile that sticks out, in each part; an activation and biases that count once."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    sizes, R = [5, 0, 18, 1], 30
    check_product(mosaic_gpu, sizes, R, 136, dtype, tiles=tiles_of(True, splits=3), interpret=True)


@needs_mosaic
def test_mlp_in_parts_has_its_biases_once() -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    tiles = (tiles_of(True, splits=2, stages=1), tiles_of(True))
    check_mlp(mosaic_gpu, "silu", None, gated=True, tiles=tiles, interpret=True)


@pytest.mark.covering(most=1)
@needs_mosaic
@pytest.mark.parametrize("swapped", [True, False], ids=["few rows", "many rows"])
def test_stages_of_two_swizzles(swapped) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    rows, matrices = rows_and_matrices(16, (2, 128, 384), dtype=jnp.bfloat16)
    tiles = tiles_of(swapped, k=128, **({"m": 8} if swapped else {"n": 64}))
    sizes = [3, 10]
    multiply = jax.jit(partial(mosaic_gpu.grouped_matmul, out_dtype=FLOAT32, tiles=tiles, interpret=True))
    out = multiply(rows, matrices, jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(out, exact(rows, matrices, sizes), atol=1e-5)


@pytest.mark.covering(most=1)
@needs_mosaic
@pytest.mark.parametrize("swapped", [True, False], ids=["few rows", "many rows"])
@pytest.mark.parametrize(("activation", "limit", "gated"), MLPS)
def test_mlp_with_biases(activation, limit, gated, swapped) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    tiles = (tiles_of(swapped), tiles_of(swapped))
    check_mlp(mosaic_gpu, activation, limit, gated, tiles=tiles, interpret=True)


# As on disk: format, block, and dtype of the scales.
PACKED = [
    ("float8_e4m3fn", (64, 64), "float32"),
    ("float8_e4m3fn", (1, 128), "bfloat16"),
    ("float8_e4m3fn", (128, 128), "float32"),
    ("int4", (1, 32), "bfloat16"),
    ("int4", (64, 128), "float32"),
    ("mxfp4", (1, 32), "uint8"),
    ("nvfp4", (1, 16), "float8_e4m3fn"),
    ("int8", (1, 128), "bfloat16"),
    # Parts of blocks that are cut between devices, and blocks of outputs that no warpgroup has as a whole.
    ("nvfp4", (1, 8), "float8_e4m3fn"),
    ("mxfp4", (1, 8), "uint8"),
    ("mxfp4", (64, 32), "uint8"),
    ("nvfp4", (64, 16), "float8_e4m3fn"),
    ("float8_e4m3fn", (64, 128), "float32"),
    ("float8_e4m3fn", (32, 64), "float32"),
    ("int8", (64, 64), "float32"),
]


@pytest.mark.covering(most=3)
@needs_mosaic
@pytest.mark.parametrize(("format", "block", "scale_dtype"), PACKED, ids=str)
def test_packed_product(format, block, scale_dtype) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    sizes, R = [5, 0, 18, 1], 30
    stack = packed_stack(format, block, scale_dtype, 4, 192 if block[0] <= 64 else 256, 128)
    [rows] = [rows_and_matrices(R, (1, 128), dtype=jnp.bfloat16)[0]]
    multiply = jax.jit(partial(mosaic_gpu.grouped_matmul, out_dtype=FLOAT32, interpret=True))
    out = multiply(rows, as_matrices(stack), jnp.asarray(sizes, jnp.int32))
    # Nothing is rounded before the sums, so this is as near as with matrices of float32.
    np.testing.assert_allclose(out, exact(rows, jax.jit(dequantize)(stack), sizes), rtol=1e-5, atol=1e-5)


@needs_mosaic
@pytest.mark.parametrize(
    ("format", "block", "scale_dtype"),
    [
        ("mxfp4", (1, 32), "uint8"),
        pytest.param("int4", (1, 32), "bfloat16", marks=pytest.mark.full),
        pytest.param("float8_e4m3fn", (8, 32), "float32", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_packed_matrices_that_end_amid_tiles(format, block, scale_dtype) -> None:
    """As gpt-oss over two tp ranks has them: 1440 outputs are no whole tiles, nor are as many inputs whole stages."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    sizes, R = [5, 0, 18, 1], 30
    stack = packed_stack(format, block, scale_dtype, 4, 200, 96)
    [rows] = [rows_and_matrices(R, (1, 96), dtype=jnp.bfloat16)[0]]
    multiply = jax.jit(partial(mosaic_gpu.grouped_matmul, out_dtype=FLOAT32, interpret=True))
    out = multiply(rows, as_matrices(stack), jnp.asarray(sizes, jnp.int32))
    np.testing.assert_allclose(out, exact(rows, jax.jit(dequantize)(stack), sizes), rtol=1e-5, atol=1e-5)


@pytest.mark.covering(most=1)
@needs_mosaic
@pytest.mark.parametrize(("format", "block"), [("int4", (1, 16)), ("float8_e4m3fn", (1, 8))], ids=str)
def test_few_numbers_a_scale_are_rounded_with_it(format, block) -> None:
    """To bfloat16, zero points taken off before."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    sizes, R = [5, 0, 18, 1], 30
    stack = packed_stack(format, block, "float32", 4, 192, 128)
    if format == "int4":
        zeros = np.random.default_rng(1).integers(0, 16, stack.scales.shape)
        stack = dataclasses.replace(stack, zero_points=jnp.asarray(zeros, jnp.uint8))
    [rows] = rows_and_matrices(R, (1, 128), dtype=jnp.bfloat16)[:1]
    multiply = jax.jit(partial(mosaic_gpu.grouped_matmul, out_dtype=FLOAT32, interpret=True))
    out = multiply(rows, as_matrices(stack), jnp.asarray(sizes, jnp.int32))
    expected = exact(rows, jax.jit(partial(dequantize, dtype=jnp.bfloat16))(stack).astype(FLOAT32), sizes)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.full
@needs_mosaic
@pytest.mark.parametrize("block", [(1, 32), (64, 128)], ids=str)
@pytest.mark.parametrize("most", [15, 255])  # codes go up to 15, but a zero point may be any byte
def test_packed_product_with_zero_points(most, block) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    sizes, R = [5, 0, 18, 1], 30
    stack = packed_stack("int4", block, "float32", 4, 192, 128)
    zeros = np.random.default_rng(1).integers(0, most + 1, stack.scales.shape)
    stack = dataclasses.replace(stack, zero_points=jnp.asarray(zeros, jnp.uint8))
    [rows] = rows_and_matrices(R, (1, 128), dtype=jnp.bfloat16)[:1]
    multiply = jax.jit(partial(mosaic_gpu.grouped_matmul, out_dtype=FLOAT32, interpret=True))
    out = multiply(rows, as_matrices(stack), jnp.asarray(sizes, jnp.int32))
    expected = exact(rows, jax.jit(dequantize)(stack), sizes)
    # A difference of two codes is exact in bfloat16: again as near as with matrices of float32.
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@needs_mosaic
@pytest.mark.parametrize(("format", "block"), [("int4", (1, 32)), ("mxfp4", (1, 32))])
def test_a_stage_read_into_registers_is_fenced_before_it_is_given_back(format, block, monkeypatch) -> None:
    """The accelerator writes by another way than registers are read, and a barrier alone does not order the two."""
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import pipeline

    steps = []
    for name in ("commit_smem", "barrier_arrive"):
        step = getattr(pipeline.plgpu, name)
        monkeypatch.setattr(pipeline.plgpu, name, lambda *args, n=name, s=step: (steps.append(n), s(*args))[1])
    stack = packed_stack(format, block, "uint8" if format == "mxfp4" else "float32", 2, 128, 128)
    options = {"out_dtype": FLOAT32, "interpret": True}
    [rows] = rows_and_matrices(16, (1, 128), dtype=jnp.bfloat16)[:1]
    sizes = jnp.asarray([3, 8], jnp.int32)
    jax.eval_shape(lambda *args: mosaic_gpu.grouped_matmul(*args, **options), rows, as_matrices(stack), sizes)
    # The first arrival is the loader's, who has added up the sizes of the groups.
    given_back = [i for i, name in enumerate(steps) if name == "barrier_arrive"][1:]
    assert given_back
    assert all(i > 0 and steps[i - 1] == "commit_smem" for i in given_back)


@pytest.mark.full
@needs_mosaic
def test_packed_mlp_is_the_portable_one() -> None:
    sizes = jnp.asarray([7, 0, 20], jnp.int32)
    x, b_up, b_down = rows_and_matrices(30, (3, 2, 64), (3, 64), dtype=jnp.bfloat16)
    up = packed_stack("mxfp4", (1, 32), "uint8", 6, 64, 64)
    up = jax.tree.map(lambda array: array.reshape(3, 2, *array.shape[1:]), up)
    down = packed_stack("int4", (1, 32), "bfloat16", 3, 64, 64)
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu, portable

    options = {
        "b_up_pN": b_up.reshape(3, 128),
        "b_down_pD": b_down,
        "combine": combine_halves("silu", None, gated=True),
        "out_dtype": FLOAT32,
    }
    arguments = (x, as_matrices(up), as_matrices(down), sizes)
    out = mosaic_gpu.expert_mlp(*arguments, **options, interpret=True)
    expected = portable.expert_mlp(*arguments, **options)
    np.testing.assert_allclose(out, expected, atol=4e-2 * float(jnp.abs(expected).max()))
    errors = np.abs(np.asarray(out) - expected) / float(jnp.abs(expected).max())
    assert np.median(errors) < 1e-3


@pytest.mark.covering(most=1)
@needs_mosaic
@pytest.mark.parametrize(("swapped", "N", "widths"), [(True, 136, {64, 8}), (False, 192, {32})])
def test_single_rows_end_with_the_matrix(swapped, N, widths, monkeypatch) -> None:
    assert widths_of_single_rows(N, tiles_of(swapped), monkeypatch) == widths


@pytest.mark.covering(most=6)
@needs_mosaic
@pytest.mark.parametrize(
    ("activation", "limit", "dtype", "format", "approximate"),
    [
        ("silu", None, "bfloat16", None, True),
        ("clamped_swiglu", 7.0, "float16", None, True),
        ("silu", None, "bfloat16", "int4", True),
        # tanh would be off by as much as a number of 16 bits is rounded, and scales of powers of two are exponentials.
        ("gelu_tanh", None, "bfloat16", None, False),
        ("situ", 0.5, "bfloat16", None, False),
        ("silu", None, "bfloat16", "mxfp4", False),
    ],
)
def test_exponentials_are_approximated_where_rounding_hides_it(activation, limit, dtype, format, approximate) -> None:
    x, up, down = rows_and_matrices(8, (1, 2, 64, 64), (1, 64, 64), dtype=dtype)
    if format:
        up = packed_stack(format, (1, 32), "uint8" if format == "mxfp4" else "bfloat16", 2, 64, 64)
        up = jax.tree.map(lambda array: array.reshape(1, 2, *array.shape[1:]), up)
    options = {"activation": activation, "limit": limit, "backend": "mosaic_gpu", "out_dtype": FLOAT32}
    program = jax.make_jaxpr(lambda *args: expert_mlp(*args, **options))(x, up, down, jnp.asarray([8], jnp.int32))
    # The second product has no activation.
    assert re.findall(r"approx_math=(\w+)", str(program)) == [str(approximate), "False"]


def test_approximated_activations_have_exponentials_and_nothing_else() -> None:
    """By what they are computed from in a kernel."""
    for name in {*ACTIVATIONS, *CLAMPED}:
        halves = combine_halves(name, 1.0, gated=True).halves
        of_kernel = lambda gate, up, halves=halves: halves(gate, up, activations=KERNEL_ACTIVATIONS)  # noqa: E731
        words = set(re.findall(r"= (\w+)", str(jax.make_jaxpr(of_kernel)(1.0, 1.0))))
        others = {"tanh", "erf", "exp2", "log", "log1p", "sqrt", "rsqrt", "sin", "cos"}
        assert (name in OF_EXPONENTIALS) == (bool(words & {"exp", "logistic"}) and not words & others), name


class Rows:
    """An array in place of a reference: it shows what `copy_rows_out` asks to copy."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    @property
    def at(self):
        return self

    def __getitem__(self, slices):
        return self.array, [(int(part.start), part.size) for part in slices]


@needs_mosaic
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("N", [8, 64, 72, 128, 136, 200, 256])
@pytest.mark.parametrize(("first", "last"), [(0, 16), (0, 1), (3, 14), (7, 7), (-9, -2), (-3, 5), (5, 21), (15, 30)])
def test_results_are_copied_as_the_accelerator_does_it(first, last, N, width, monkeypatch) -> None:
    """Into a matrix in flat memory: boxes are cut off at its edges, but runs of bytes are not."""
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import pipeline

    height, row, memory = 16, 8, np.zeros((40, N))

    def copy(source, target, *, commit_group):
        assert not commit_group
        (array, ((top, rows), (left, columns))), (_, ((to_top, _), (to_left, _))) = source, target
        block = array[top : top + rows, left : left + columns]
        assert block.shape == (rows, columns)
        assert to_left * 2 % 16 == columns * 2 % 16 == (top * width + left) * 2 % 16 == 0
        if rows == 1 or columns == N:
            start = to_top * N + to_left
            memory.reshape(-1)[start : start + block.size] = block.reshape(-1)
        else:
            there = memory[to_top : to_top + rows, to_left : to_left + columns]
            there[...] = block[:, : there.shape[1]]

    monkeypatch.setattr(pipeline.pl, "when", lambda condition: lambda body: body() if condition else None)
    monkeypatch.setattr(pipeline.plgpu, "copy_smem_to_gmem", copy)
    monkeypatch.setattr(pipeline.plgpu, "commit_smem_to_gmem_group", lambda: None)
    expected = np.zeros_like(memory)
    # Of two warpgroups that share the outputs of a tile, the second may be beyond the matrix.
    for column in range(0, -(-N // (2 * width)) * 2 * width, width):
        results = 1 + np.arange(height * width).reshape(height, width) + 10000 * column
        inside = results[max(first, 0) : max(last, 0), : max(N - column, 0)]
        expected[row + max(first, 0) : row + max(first, 0) + len(inside), column : column + width] = inside
        pipeline.copy_rows_out(Rows(results), Rows(memory), row, first, last, column)
    np.testing.assert_array_equal(memory, expected)


@needs_mosaic
def test_tiles_that_do_not_divide_the_matrices_are_refused() -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    rows, matrices = rows_and_matrices(16, (1, 64, 96), dtype=jnp.bfloat16)
    problem = mosaic_gpu.problem_of(rows, matrices, 1, FLOAT32)
    with pytest.raises(ValueError, match=r"k must divide 96; got Tiles\(m=16, n=128, k=64.*: use 32"):
        problem.check(tiles_of(True, k=64))
    with pytest.raises(ValueError, match="m must be a multiple of 128 and n of 64"):
        problem.check(tiles_of(False, m=64))
    with pytest.raises(ValueError, match="m must be a multiple of 128 and n of 64"):
        problem.check(tiles_of(False, n=72))
    with pytest.raises(ValueError, match="tiles must be swapped where .* N, here 72, is no multiple of 64"):
        dataclasses.replace(problem, N=72).check(tiles_of(False))
    packed = dataclasses.replace(problem, K=128, block=(1, 32), weight_bits=8)
    integers = dataclasses.replace(packed, format="int8", row_block=128, row_bytes=1)
    with pytest.raises(
        ValueError, match=r"m must be one of \(8, 16, 24, 32, 48, .* where rows are integers; got .*m=40"
    ):
        integers.check(tiles_of(True, m=40))
    # Parts have whole stages; scales of packed matrices are not shared out.
    with pytest.raises(ValueError, match=r"splits must be one of \(1, 3\) here; got .*splits=2"):
        problem.check(tiles_of(True, splits=2))
    with pytest.raises(ValueError, match=r"splits must be one of \(1,\) here; got .*splits=2"):
        packed.check(tiles_of(True, splits=2))
    with pytest.raises(ValueError, match="n must be 128 where matrices are packed"):
        packed.check(tiles_of(True, n=256))
    # A stage is given back when the next one is under way: with room for one, both would wait for ever.
    with pytest.raises(ValueError, match="stages must be 2 at least, and band 1; got .*stages=1"):
        problem.check(tiles_of(True, stages=1))
    dataclasses.replace(problem, K=32).check(tiles_of(True, stages=1))
    packed.check(tiles_of(True, stages=1))
    with pytest.raises(ValueError, match="stages must be 2 at least, and band 1; got .*band=0"):
        problem.check(tiles_of(True, band=0))
    with pytest.raises(ValueError, match="need 264320 bytes of shared memory, of 232448"):
        problem.check(tiles_of(False, stages=14))
    with pytest.raises(ValueError, match="k must divide 96"):
        mosaic_gpu.grouped_matmul(
            rows, matrices, jnp.asarray([16], jnp.int32), out_dtype=FLOAT32, tiles=tiles_of(True, k=64), interpret=True
        )


@needs_mosaic
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("rows", [1, 8, 30, 100, 4096])
@pytest.mark.parametrize(("bits", "block"), [(16, None), (8, (128, 128)), (4, (1, 32))], ids=str)
def test_chosen_tiles_fit(rows, halves, bits, block) -> None:
    from jaxmoe.kernels.grouped_matmul.mosaic_gpu import Problem, candidate_tiles, choose_tiles

    for N, K, out_bytes in [(14336, 4096, 2), (768, 2048, 4), (2048, 768, 2), (1440, 2880, 2), (2880, 1440, 4)]:
        if block == (128, 128) and 1440 in (N, K):
            continue
        problem = Problem(
            R=16 * rows, G=16, halves=halves, N=N, K=K, out_bytes=out_bytes, weight_bits=bits, block=block
        )
        chosen = choose_tiles(problem)
        assert chosen.stages > 1
        assert problem.K % chosen.k == 0 or (bits, K, chosen.k) == (4, 1440, 64)
        assert chosen.swapped or not (bits < 16 or N == 1440)
        candidates = candidate_tiles(problem)
        assert candidates[0] == chosen
        assert len(set(candidates)) == len(candidates)
        for tiles in candidates:
            problem.check(tiles)


@needs_mosaic
@pytest.mark.parametrize(
    ("dtype", "N", "K", "message"),
    [
        (jnp.float32, 64, 64, "multiplies rows of bfloat16 and float16; got float32"),
        (jnp.bfloat16, 42, 64, "got N=42, K=64: use the portable one"),
        (jnp.bfloat16, 64, 40, "a multiple of 8 outputs and of 16 inputs here; got N=64, K=40"),
    ],
)
def test_what_it_does_not_multiply(dtype, N, K, message) -> None:
    rows, matrices = rows_and_matrices(8, (1, N, K), dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        grouped_matmul(rows, matrices, jnp.asarray([8], jnp.int32), backend="mosaic_gpu")


@needs_mosaic
def test_what_it_does_not_unpack() -> None:
    sizes, [rows] = jnp.asarray([8], jnp.int32), [rows_and_matrices(8, (1, 128), dtype=jnp.bfloat16)[0]]

    def multiply(stack, rows=rows):
        return grouped_matmul(rows, stack, sizes, backend="mosaic_gpu")

    groups = packed_stack("int4", (1, 32), "bfloat16", 1, 64, 128)
    with pytest.raises(NotImplementedError, match="rows of bfloat16 with packed matrices; got float16"):
        multiply(groups, rows.astype(jnp.float16))
    with pytest.raises(NotImplementedError, match=r"got blocks of \(1, 4\) in matrices of 64 by 128"):
        multiply(packed_stack("int4", (1, 4), "bfloat16", 1, 64, 128))
    factors = dataclasses.replace(groups, matrix_scales=jnp.ones((1, 2)))
    with pytest.raises(NotImplementedError, match=r"one of matrix_scales for a matrix; got 2 for 1: use the portable"):
        multiply(factors)
    with pytest.raises(NotImplementedError, match="a multiple of 64 outputs and of 32 inputs here; got N=72"):
        multiply(packed_stack("int4", (1, 32), "bfloat16", 1, 72, 128))


def test_a_layer_refuses_it_where_it_cannot_run() -> None:
    config = MoEConfig(num_experts=4, num_experts_per_tok=2, hidden_size=64, moe_intermediate_size=32)
    message = (
        "need jax 0.11.2 or newer" if OLD else r"run on Hopper and Blackwell .*\(H100, .*B200\); these devices are cpu"
    )
    with pytest.raises(NotImplementedError, match=message):
        MoE(config, mesh=mesh_of(1, 1, 4), kernels="mosaic_gpu")
    with pytest.raises(ValueError, match=r"one of \['mosaic_gpu', .*'portable', 'reference'.*\]; got 'fast'"):
        check_backend("fast", jax.devices()[0])
    with pytest.raises(ValueError, match="got 'fast'"):
        expert_mlp(
            *rows_and_matrices(4, (1, 2, 32, 64), (1, 64, 32), dtype=jnp.bfloat16),
            jnp.asarray([4], jnp.int32),
            backend="fast",
        )
