"""The packed representation itself: every number of every format, what goes through JAX, and what is refused."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.grouped_matmul import QuantizedStack, dequantize, expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.quantized import as_matrices
from tests.support.kernels import int32
from tests.support.meshes import mesh_of
from tests.support.packed import Case, D, F, G, each_case, pack

pytestmark = pytest.mark.covering(most=4)


@each_case
def test_dequantize(case):
    stack, exact = pack(case, 0, G, 2, F, D)
    assert (stack.shape, stack.ndim) == ((G, 2, F, D), 4)
    wide = jax.jit(dequantize)(stack)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, exact, rtol=1e-6)
    narrow = jax.jit(partial(dequantize, dtype=jnp.bfloat16))(stack)
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def one_scale(values, format, scale):
    """Bytes with one scale for all."""
    values = jnp.asarray(values)[None]
    stack = QuantizedStack(values=values, scales=jnp.asarray([[scale]]), format=format, block=(1, 2 * values.size))
    return dataclasses.replace(stack, block=stack.shape)


def test_every_float8_number():
    values = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    numbers = jax.jit(dequantize)(one_scale(values, "float8_e4m3fn", np.float32(1)))[0]
    np.testing.assert_array_equal(numbers, values.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(numbers)[[0x00, 0x80]], [False, True])
    np.testing.assert_array_equal(
        numbers[jnp.array([0x7E, 0x7F, 0xFF, 0x08, 0x01, 0x38])], [448, np.nan, np.nan, 2.0**-6, 2.0**-9, 1]
    )


@pytest.mark.parametrize(("byte", "pair"), [(0xAB, (-1.5, -1.0)), (0x17, (6.0, 0.5))])
def test_mxfp4_golden_vectors(byte, pair):
    assert tuple(dequantize(one_scale(np.uint8([byte]), "mxfp4", np.uint8(127)))[0].tolist()) == pair


def test_every_mxfp4_number():
    codes = np.arange(16, dtype=np.uint8)
    numbers = jax.jit(dequantize)(one_scale(codes[::2] | codes[1::2] << 4, "mxfp4", np.uint8(127)))[0]
    np.testing.assert_array_equal(numbers, codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32))
    np.testing.assert_array_equal(np.signbit(numbers), codes >= 8)


def test_every_int8_number():
    values = np.arange(-128, 128, dtype=np.int8)
    numbers = jax.jit(dequantize)(one_scale(values, "int8", np.float32(0.5)))[0]
    np.testing.assert_array_equal(numbers, values / np.float32(2))


def test_nvfp4_golden_vector():
    """Bytes and scale as they were written by hand: 0.5 · 1.75 · 0.0625 and -6 · 1.75 · 0.0625."""
    stack = one_scale(np.uint8([0xF1]), "nvfp4", ml_dtypes.float8_e4m3fn(1.75))
    stack = dataclasses.replace(stack, matrix_scales=jnp.float32(0.0625))
    assert dequantize(stack)[0].tolist() == [0.0546875, -0.65625]


def test_every_nvfp4_scale():
    scales = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)[:, None]
    ones = jnp.full((256, 1), 0x22, jnp.uint8)
    numbers = dequantize(QuantizedStack(values=ones, scales=jnp.asarray(scales), format="nvfp4", block=(1, 2)))
    np.testing.assert_array_equal(numbers, np.repeat(scales.astype(np.float32), 2, 1))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2)], ids=["one a matrix", "two a matrix"])
def test_matrix_scales_are_applied_where_matrices_stand_in_one(shape):
    """As `as_matrices` puts them for backends, and for each half of a matrix's outputs."""
    stack, _ = pack(Case("nvfp4", (1, 16)), 0, 2, 3, 8, 32)
    plain = jax.jit(dequantize)(stack)
    factors = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2, shape), jnp.float32)
    scaled = dataclasses.replace(stack, matrix_scales=factors)
    expected = plain * jnp.repeat(factors.reshape(2, 3, -1), 8 // (factors.size // 6), axis=-1)[..., None]
    alone, as_one = jax.jit(lambda scaled: (dequantize(scaled), dequantize(as_matrices(scaled))))(scaled)
    np.testing.assert_allclose(alone, expected, rtol=1e-6)
    np.testing.assert_allclose(as_one, expected.reshape(2, 24, 32), rtol=1e-6)


def test_every_mxfp4_scale():
    scales = np.arange(256, dtype=np.uint8)[:, None]
    ones = jnp.full((256, 1), 0x22, jnp.uint8)
    numbers = dequantize(QuantizedStack(values=ones, scales=jnp.asarray(scales), format="mxfp4", block=(1, 2)))
    expected = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(numbers[1:], np.repeat(expected, 2, 1)[1:])
    assert numbers[0, 0] in (0, expected[0, 0])  # subnormal, and zero where the device takes it for that


@pytest.mark.parametrize(("word", "numbers"), [(0x76543210, range(-8, 0)), (0xFEDCBA98, range(8))])
def test_int4_golden_vectors(word, numbers):
    """compressed-tensors keeps eight numbers in an int32, from its lowest bits on, as q + 8."""
    stack = one_scale(np.array([word], "<u4").view(np.uint8), "int4", np.float32(1))
    assert dequantize(stack)[0].tolist() == list(numbers)
    zeros = dataclasses.replace(stack, zero_points=jnp.uint8([[8]]))
    assert dequantize(zeros)[0].tolist() == list(numbers)


@each_case
def test_is_a_pytree_of_its_arrays(case):
    stack, _ = pack(case, 0, 8, F, D)
    mesh = mesh_of(2, 1, 4)
    placed = jax.device_put(stack, NamedSharding(mesh, P("ep")))
    doubled = jax.jit(lambda s: dataclasses.replace(s, scales=s.scales * 2))(placed)
    assert (doubled.format, doubled.block, doubled.shape) == (stack.format, stack.block, stack.shape)
    for array in jax.tree.leaves(doubled):
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, P("ep")), array.ndim)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
    np.testing.assert_array_equal(doubled.values, stack.values)
    assert len(jax.tree.leaves(stack)) == 2 + case.zero_points + case.matrix_scales
    assert [str(path) for path, _ in jax.tree.leaves_with_path(stack)][:2] == [
        "(GetAttrKey(name='values'),)",
        "(GetAttrKey(name='scales'),)",
    ]
    norms = jax.tree.map(lambda array: array.size, stack)  # of no shape that fits
    assert norms.values == stack.values.size


def small(**changes):
    """Two matrices of 6 by 8 in int4, with a scale for 3 by 4 numbers each."""
    arrays = {
        "values": jnp.zeros((2, 6, 4), jnp.uint8),
        "scales": jnp.ones((2, 2, 2)),
        "zero_points": jnp.zeros((2, 2, 2), jnp.uint8),
    }
    return QuantizedStack(**{**arrays, "format": "int4", "block": (3, 4)} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": jnp.zeros((2, 6, 8))}, "values of rhs must be uint8 for int4; got float32"),
        ({"scales": jnp.ones((2, 2, 2), int)}, "scales of rhs must be floating point for int4; got int32.*astype"),
        ({"format": "mxfp4", "zero_points": None}, "scales of rhs must be uint8 for mxfp4; got float32.*View"),
        ({"format": "float8_e4m3fn"}, "values of rhs must be float8_e4m3fn for float8_e4m3fn; got uint8.*View"),
        (
            {"format": "mxfp4", "scales": jnp.ones((2, 2, 2), jnp.uint8)},
            "zero_points of rhs must be None: numbers of mxfp4 have a sign",
        ),
        ({"zero_points": jnp.zeros((2, 2, 2), int)}, "zero_points of rhs must be uint8 for int4; got int32"),
        (
            {"zero_points": jnp.zeros((2, 2, 1), jnp.uint8)},
            r"zero_points of rhs must have the shape of its scales, \(2, 2, 2\); got \(2, 2, 1\).*Unpack",
        ),
        (
            {"block": (4, 6)},
            r"block of rhs, \(4, 6\), must divide its matrices of 6 by 8. Make blocks of \(2, 2\), and repeat",
        ),
        (
            {"block": (1, 8)},
            r"scales of rhs must have shape \(2, 6, 1\), one for each block of \(1, 8\) in matrices of 6 by 8; got "
            r"\(2, 2, 2\).*Reshape",
        ),
        ({"scales": jnp.ones((2, 2))}, r"scales of rhs must have shape \(2, 2, 2\).*got \(2, 2\)"),
        ({"matrix_scales": jnp.ones(2, jnp.bfloat16)}, "matrix_scales of rhs must be float32; got bfloat16.*astype"),
        (
            {"matrix_scales": jnp.ones(3)},
            r"matrix_scales of rhs must have shape \(2,\), one number a matrix.*divides its 2 rows of blocks; got \(3,\)",
        ),
        ({"matrix_scales": jnp.ones((2, 3))}, r"matrix_scales of rhs must have shape \(2,\).*got \(2, 3\)"),
        ({"matrix_scales": jnp.ones((2, 1, 1))}, r"matrix_scales of rhs must have shape \(2,\).*got \(2, 1, 1\)"),
        (
            {"format": "nvfp4", "zero_points": None},
            "scales of rhs must be float8_e4m3fn for nvfp4; got float32.*View",
        ),
        ({"format": "int8", "zero_points": None}, "values of rhs must be int8 for int8; got uint8.*View"),
        ({"values": jnp.zeros((2, 3, 8), jnp.uint8)}, r"scales of rhs must have shape \(2, 1, 4\)"),
    ],
)
def test_check(changes, message):
    stack = small(**changes)
    with pytest.raises(ValueError, match=message):
        grouped_matmul(jnp.ones((3, 8)), stack, int32([1, 2]))
    with pytest.raises(ValueError, match=message.replace("rhs", "the stack")):
        dequantize(stack)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "nf4"}, r"format must be one of \['float8_e4m3fn', 'int4', 'int8', 'mxfp4', 'nvfp4'\]; got 'nf4'"),
        ({"block": 32}, r"block must be a tuple of two positive sizes.*got 32.*\(1, K\)"),
        ({"block": [1, 32]}, r"block must be a tuple of two positive sizes.*got \[1, 32\]"),
        ({"block": (0, 32)}, r"block must be a tuple of two positive sizes.*got \(0, 32\)"),
    ],
)
def test_refuses_to_be_made(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_shapes_have_to_fit_the_rows():
    with pytest.raises(ValueError, match=r"rhs must have shape \(2, 6, 7\) to fit rows.*got \(2, 6, 8\).*transpose"):
        grouped_matmul(jnp.ones((3, 7)), small(), int32([1, 2]))
    with pytest.raises(ValueError, match=r"w_gate_up must have 4 dimensions, \[p, 2, F, D\]; got shape \(2, 6, 8\)"):
        expert_mlp(jnp.ones((3, 8)), small(), small(), int32([1, 2]))
    with pytest.raises(ValueError, match=r"w_down must have shape \(2, 8, 8\) to fit rows.*got \(2, 6, 8\)"):
        expert_mlp(jnp.ones((3, 8)), jnp.ones((2, 1, 8, 8)), small(), int32([1, 2]))
    with pytest.raises(ValueError, match=r"the stack must hold matrices, \[..., N, K\]; got values of shape \(4,\)"):
        dequantize(small(values=jnp.zeros(4, jnp.uint8)))
