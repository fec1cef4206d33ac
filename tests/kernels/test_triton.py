"""The Triton kernel in Pallas's interpreter, against products in float64.

The interpreter runs one program after the other on arrays. It says nothing of speed, of registers or of what Triton and
ptxas make of the kernel: tests/aot does that.
"""

import math
from functools import cache, partial
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxmoe.config import MoEConfig
from jaxmoe.kernels.grouped_matmul import backends, check_backend, portable, reference, triton
from jaxmoe.kernels.grouped_matmul import expert_mlp as checked_expert_mlp
from jaxmoe.kernels.grouped_matmul import grouped_matmul as checked_grouped_matmul
from jaxmoe.kernels.grouped_matmul.combine import combine_halves, gelu_without_erf
from jaxmoe.kernels.grouped_matmul.quantized import QuantizedStack
from jaxmoe.layers import MoE
from jaxmoe.numerics import ACTIVATIONS
from tests.support.kernels import FLOAT32, arrays, exact, int32, poison, rows_and_matrices
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=4)


# One compiled function a set of options: compiling is what costs here, so tests vary the group sizes only.
@cache
def compiled(name, **options):
    return jax.jit(partial(getattr(triton, name), interpret=True, **options))


# Both regimes of tiles: up to 32 rows a group, and more. N and K are multiples of nothing in sight.
@pytest.mark.parametrize(
    ("sizes", "R", "N", "K", "dtype"),
    [
        ([5, 0, 40, 1], 60, 90, 45, "float32"),
        ([5, 0, 40, 1], 60, 90, 90, "bfloat16"),
        ([3, 200, 0, 17], 240, 90, 130, "bfloat16"),
        ([3, 200, 0, 17], 220, 90, 130, "float16"),
        ([150], 150, 256, 64, "bfloat16"),
        ([0, 0, 0], 20, 16, 16, "bfloat16"),
        ([1, 1, 1, 1], 4, 1, 1, "float32"),
        ([0, 0], 0, 3, 16, "float32"),
        ([2], 2, 3, 0, "float32"),
    ],
    ids=str,
)
def test_product(sizes, R, N, K, dtype) -> None:
    rows, matrices = arrays((R, K), (len(sizes), N, K), dtype=dtype) if K else (jnp.ones((R, 0)), jnp.ones((1, N, 0)))
    out = compiled("grouped_matmul", out_dtype=FLOAT32)(poison(rows, sizes), matrices, int32(sizes))
    assert out.dtype == FLOAT32
    np.testing.assert_allclose(out, exact(rows, matrices, sizes), atol=2e-6)
    np.testing.assert_array_equal(out[sum(sizes) :], 0)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("R", [40, 170])
def test_all_patterns_of_empty_groups(R) -> None:
    rows, matrices = arrays((R, 45), (4, 90, 45))
    for pattern in product([0, 1], repeat=4):
        sizes = np.array(pattern) * (R // 4)
        out = compiled("grouped_matmul", out_dtype=FLOAT32)(poison(rows, sizes), matrices, int32(sizes))
        np.testing.assert_allclose(out, exact(rows, matrices, sizes), atol=2e-6)


@pytest.mark.full
@pytest.mark.parametrize("R", [40, 170])
@settings(max_examples=20)
@given(data=st.data())
def test_random_group_sizes(R, data) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, R), min_size=4, max_size=4)))
    sizes = np.diff([0, *cuts])
    rows, matrices = arrays((R, 45), (4, 90, 45))
    out = compiled("grouped_matmul", out_dtype=FLOAT32)(poison(rows, sizes), matrices, int32(sizes))
    np.testing.assert_allclose(out, exact(rows, matrices, sizes), atol=2e-6)


def test_sizes_beyond_the_rows_are_cut_off() -> None:
    rows, matrices = arrays((40, 45), (4, 90, 45))
    function = compiled("grouped_matmul", out_dtype=FLOAT32)
    cut, beyond = (function(rows, matrices, int32([37, 0, last, 9 * last])) for last in (3, 9))
    np.testing.assert_array_equal(beyond, cut)


def mlp_arrays(R, halves, *, groups=3, D=90, F=45, dtype=jnp.float32):
    return rows_and_matrices(R, (groups, halves * F, D), (groups, D, F), (groups, halves * F), (groups, D), dtype=dtype)


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("sizes", [[7, 0, 20], [7, 0, 120]], ids=["few rows", "many rows"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("activation", "limit", "gated"),
    [
        ("silu", None, True),
        ("silu", None, False),
        ("clamped_swiglu", 0.7, True),
        ("situ", 0.5, True),
        ("relu2", None, False),
    ],
)
def test_mlp_with_biases(activation, limit, gated, dtype, sizes) -> None:
    x, up, down, b_up, b_down = mlp_arrays(sum(sizes) + 20, 2 if gated else 1, dtype=dtype)
    options = {"combine": combine_halves(activation, limit, gated=gated), "out_dtype": FLOAT32}
    y = compiled("expert_mlp", **options)(poison(x, sizes), up, down, int32(sizes), b_up_pN=b_up, b_down_pD=b_down)
    first, *second = np.split(exact(x, up, sizes, b_up), 2 if gated else 1, axis=1)
    if activation == "clamped_swiglu":
        gate, linear = np.minimum(first, limit), np.clip(second[0], -limit, limit)
        h = (linear + 1) * gate / (1 + np.exp(-1.702 * gate))
    elif activation == "situ":
        h = limit * np.tanh(first / limit) / (1 + np.exp(-first)) * 25 * np.tanh(second[0] / 25)
    else:
        h = first / (1 + np.exp(-first)) if activation == "silu" else np.maximum(first, 0) ** 2
        h = h * second[0] if gated else h
    expected = exact(jnp.asarray(h, dtype), down, sizes, b_down)
    # The kernel rounds h to the rows' dtype as well, now and then to the other side.
    error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
    assert error <= (1e-6 if dtype == "float32" else 3e-4)
    np.testing.assert_array_equal(y[sum(sizes) :], 0)


@pytest.mark.full
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gated) -> None:
    sizes = [7, 0, 12]
    x, up, down, *_ = mlp_arrays(20, 2 if gated else 1)
    options = {"combine": combine_halves(activation, None, gated=gated), "out_dtype": FLOAT32}
    options |= {"b_up_pN": None, "b_down_pD": None}
    y = compiled("expert_mlp", **options)(poison(x, sizes), up, down, int32(sizes))
    expected = jax.jit(partial(reference.expert_mlp, **options))(x, up, down, int32(sizes))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)


def test_gelu_without_erf() -> None:
    x = np.linspace(-12, 12, 4801, dtype=np.float32)
    exact = np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x.astype(np.float64)])
    error = np.abs(np.asarray(gelu_without_erf(jnp.asarray(x)), np.float64) - exact)
    assert (error <= 2e-7 * np.abs(x)).all()


@pytest.mark.full
def test_out_dtype_keeps_the_float32_sums() -> None:
    x, up, down, b_up, b_down = mlp_arrays(30, 2, dtype=jnp.bfloat16)
    combine = combine_halves("silu", None, gated=True)
    wide, narrow = (
        compiled("expert_mlp", combine=combine, out_dtype=jnp.dtype(dtype))(
            x, up, down, int32([7, 3, 20]), b_up_pN=b_up, b_down_pD=b_down
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)


@pytest.mark.full
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("jitted_inside", [True, False])
def test_gradient_is_that_of_the_portable_backend(biases, jitted_inside) -> None:
    x, up, down, b_up, b_down = mlp_arrays(40, 2)
    differentiated = (poison(x, [7, 0, 20]), up, down, *([b_up, b_down] if biases else [None, None]))
    dy = arrays((40, 90), seed=1)[0]

    def gradient(backend, **more):
        def mlp(arrays, sizes):
            *arrays, b_up, b_down = arrays
            return backend.expert_mlp(
                *arrays,
                sizes,
                b_up_pN=b_up,
                b_down_pD=b_down,
                combine=combine_halves("silu", None, gated=True),
                out_dtype=FLOAT32,
                **more,
            )

        mlp = jax.jit(mlp) if jitted_inside else mlp
        return jax.jit(jax.grad(lambda arrays, sizes: jnp.sum(mlp(arrays, sizes) * dy)))(
            differentiated, int32([7, 0, 20])
        )

    got, expected = gradient(triton, interpret=True), gradient(portable)
    assert len(jax.tree.leaves(got)) == (5 if biases else 3)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.full
def test_inside_shard_map() -> None:
    """Experts over ep, F over tp; each ep rank has its own rows, its own sizes and a poisoned tail. Gradients too."""
    tp, ep, R, D, F = 2, 4, 20, 24, 16
    sizes = np.array([[3, 0], [0, 0], [16, 4], [0, 1]])
    x_RD, w_up, w_down = arrays((R, D), (2 * ep, 2, F, D), (2 * ep, D, F))
    x_eRD = jnp.stack([poison(x_RD, s) for s in sizes])

    def outputs_and_gradients(function, check_vma):
        def local(x_1RD, w_up, w_down, sizes_p):
            y = function(
                x_1RD[0],
                w_up.reshape(2, -1, D),
                w_down,
                sizes_p,
                b_up_pN=None,
                b_down_pD=None,
                combine=combine_halves("silu", None, gated=True),
                out_dtype=FLOAT32,
            )
            return jax.lax.psum(y, "tp")[None]

        mlp = jax.shard_map(
            local,
            mesh=mesh_of(1, tp, ep),
            in_specs=(P("ep"), P("ep", None, "tp"), P("ep", None, "tp"), P("ep")),
            out_specs=P("ep"),
            check_vma=check_vma,
        )
        y, pullback = jax.vjp(lambda *arrays: mlp(*arrays, int32(sizes.reshape(-1))), x_eRD, w_up, w_down)
        return y, pullback(jnp.ones_like(y))

    interpreted = partial(triton.expert_mlp, interpret=True)
    got, expected = (jax.jit(partial(outputs_and_gradients, f, False))() for f in (interpreted, portable.expert_mlp))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), got, expected)
    # Pallas's interpreter does not run with what varies being checked; the types, which are what is checked, are right.
    checked = jax.eval_shape(partial(outputs_and_gradients, triton.expert_mlp, True))
    assert jax.tree.map(jnp.shape, checked) == jax.tree.map(jnp.shape, expected)


@pytest.mark.full
def test_inside_a_while_loop() -> None:
    x, up, down, b_up, b_down = mlp_arrays(30, 2)
    options = {"b_up_pN": b_up, "b_down_pD": b_down, "combine": combine_halves("silu", None, gated=True)}
    sizes_sp = int32([[1, 2, 3], [0, 20, 0]])

    def both(function, x):
        def step(i, x):
            return function(x, up, down, sizes_sp[i], **options, out_dtype=FLOAT32)

        return jax.lax.fori_loop(0, 2, step, x)

    got, expected = (
        jax.jit(partial(both, f))(x) for f in (partial(triton.expert_mlp, interpret=True), portable.expert_mlp)
    )
    np.testing.assert_allclose(got, expected, atol=5e-6)


@pytest.mark.parametrize(("R", "G"), [(1, 1), (8, 128), (64, 8), (64, 1), (4096, 128), (8192, 8), (100, 2)])
def test_tiles_fit(R, G) -> None:
    for N, K, itemsize in product([1, 90, 1536, 5760, 28672], [1, 90, 2880, 7168], [2, 4]):
        tiles, *others = candidates = triton.candidate_tiles(R, G, K, N, itemsize)
        assert tiles == triton.choose_tiles(R, G, K, N, itemsize)
        assert others
        for size in (size for tiles in candidates for size in (tiles.m, tiles.n, tiles.k)):
            assert size >= 16
            assert size & (size - 1) == 0
        # Triton keeps one step less than it has under way, and all of them on Hopper.
        step = (tiles.m + tiles.n) * tiles.k * itemsize
        assert (tiles.stages - 1) * step <= 99 * 2**10
        assert tiles.stages * step <= 227 * 2**10


def test_tiles_of_two_regimes() -> None:
    decode, prefill = (triton.choose_tiles(R, 8, 4096, 28672, 2) for R in (64, 8192))
    assert (decode.m, decode.n, decode.k) == (16, 64, 128)
    assert (prefill.m, prefill.n, prefill.k) == (128, 256, 64)
    # One token of two experts: narrower strips, for more programs.
    assert triton.choose_tiles(2, 8, 14336, 4096, 2).n == 32
    # And where a GPU has few multiprocessors they stay wide.
    assert [triton.choose_tiles(8, 4, 4096, 4096, 2, processors=count).n for count in (132, 114)] == [32, 64]
    # 2880 is a multiple of neither; the smaller one leaves less of the last tile empty.
    assert triton.choose_tiles(8192, 8, 2880, 2880, 2).n == 128


@pytest.mark.full
def test_given_tiles_are_used() -> None:
    sizes = [3, 0, 30, 7]
    rows, matrices = arrays((50, 90), (4, 90, 90))
    results = []
    for tiles in (triton.Tiles(m=16, n=32, k=16, stages=3, warps=4, band=1), triton.Tiles(32, 128, 32, 3, 4)):
        function = compiled("grouped_matmul", out_dtype=FLOAT32, tiles=tiles)
        assert f"{tiles.m},{tiles.n}" in str(jax.make_jaxpr(function)(rows, matrices, int32(sizes)))
        results.append(function(poison(rows, sizes), matrices, int32(sizes)))
        np.testing.assert_allclose(results[-1], exact(rows, matrices, sizes), atol=2e-6)
    x, up, down, b_up, b_down = mlp_arrays(30, 2)
    options = {"b_up_pN": b_up, "b_down_pD": b_down, "combine": combine_halves("silu", None, gated=True)}
    options |= {"out_dtype": FLOAT32}
    got = triton.expert_mlp(
        x,
        up,
        down,
        int32([7, 3, 20]),
        **options,
        tiles=(triton.Tiles(16, 32, 16, 3, 4), triton.Tiles(64, 32, 16, 3, 4)),
        interpret=True,
    )
    np.testing.assert_allclose(got, portable.expert_mlp(x, up, down, int32([7, 3, 20]), **options), atol=5e-6)


row_tiles = jax.jit(triton.row_tiles, static_argnums=(1, 2))


@pytest.mark.full
@settings(max_examples=50)
@given(data=st.data())
def test_every_row_is_in_one_tile(data) -> None:
    R, G = data.draw(st.sampled_from([(1, 1), (3, 7), (40, 3), (100, 1), (130, 2), (16, 16), (600, 4)]))
    sizes = data.draw(st.lists(st.integers(0, R), min_size=G, max_size=G))
    m = data.draw(st.sampled_from([16, 32, 128]))
    tiles = row_tiles(int32(sizes), R, m)
    owners = np.append(np.repeat(np.arange(G), sizes), np.full(R, G))[:R]
    seen = np.full(R, -1)
    for group, first, end in zip(*map(np.asarray, tiles), strict=True):
        rows = np.arange(first, min(first + m, end))
        assert (seen[rows] == -1).all()
        seen[rows] = group
    np.testing.assert_array_equal(seen, owners)


@pytest.mark.parametrize("band", [1, 8])
@pytest.mark.parametrize("shape", [(1, 1), (8, 5), (19, 3), (3, 40)])
def test_programs_are_all_tiles(shape, band) -> None:
    row, column = triton._place(np.arange(math.prod(shape)), *shape, band)
    assert sorted(zip(row.tolist(), column.tolist(), strict=True)) == list(product(*map(range, shape)))


def test_programs_may_run_in_any_order(monkeypatch) -> None:
    """A program writes rows of its own group only: the interpreter's order would hide what a later one overwrites."""
    place = triton._place

    def from_the_end(program, row_tiles, column_tiles, band):
        return place(row_tiles * column_tiles - 1 - program, row_tiles, column_tiles, band)

    monkeypatch.setattr(triton, "_place", from_the_end)
    sizes = [5, 0, 20, 1, 3]
    rows, matrices = arrays((40, 45), (5, 90, 45))
    # Not `compiled`, which may have it in the interpreter's order.
    multiply = jax.jit(partial(triton.grouped_matmul, out_dtype=FLOAT32, interpret=True))
    out = multiply(poison(rows, sizes), matrices, int32(sizes))
    np.testing.assert_allclose(out, exact(rows, matrices, sizes), atol=2e-6)


def test_neighbouring_programs_share_a_strip_of_weights() -> None:
    row, column = triton._place(np.arange(64), 16, 4, 8)
    np.testing.assert_array_equal(row[:9], [0, 1, 2, 3, 4, 5, 6, 7, 0])
    np.testing.assert_array_equal(column[:9], [0] * 8 + [1])


@pytest.mark.parametrize(
    ("kind", "capability", "refused"),
    [
        ("NVIDIA A100-SXM4-80GB", "8.0", {"mosaic_gpu"}),
        ("NVIDIA GeForce RTX 4090", "8.9", {"mosaic_gpu"}),
        ("NVIDIA H100 80GB HBM3", "9.0", set()),
        ("NVIDIA B200", "10.0", set()),
        ("NVIDIA GeForce RTX 5090", "12.0", {"mosaic_gpu"}),
        ("Tesla T4", "7.5", {"mosaic_gpu", "triton"}),
        ("AMD Instinct MI300X", "gfx942", {"mosaic_gpu", "triton"}),
    ],
)
@pytest.mark.parametrize("name", ["mosaic_gpu", "triton"])
def test_devices(name, kind, capability, refused, monkeypatch) -> None:
    monkeypatch.setattr(backends, "missing_libdevice", str)
    if name == "mosaic_gpu" and jax.__version_info__ < (0, 12):
        pytest.skip("the Mosaic kernel needs jax 0.12")
    device = SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)
    if name not in refused:
        check_backend(name, device)
        return
    with pytest.raises(NotImplementedError, match=rf"'{name}' run on .*; these devices are {kind} \(gpu\)"):
        check_backend(name, device)


def test_a_layer_refuses_it_where_it_cannot_run() -> None:
    config = MoEConfig(num_experts=4, num_experts_per_tok=2, hidden_size=64, moe_intermediate_size=32)
    with pytest.raises(NotImplementedError, match=r"run on NVIDIA GPUs since Ampere .*; these devices are cpu"):
        MoE(config, mesh=mesh_of(1, 1, 4), kernels="triton")


def test_packed_matrices_are_refused() -> None:
    def packed(N, K):
        values, scales = jnp.ones((1, N, K // 2), jnp.uint8), jnp.ones((1, N, 1), jnp.uint8)
        return QuantizedStack(values=values, scales=scales, format="mxfp4", block=(1, K))

    message = "'triton' do not take matrices packed as mxfp4: use 'portable'"
    with pytest.raises(NotImplementedError, match=message):
        checked_grouped_matmul(jnp.ones((2, 32)), packed(4, 32), int32([2]), backend="triton")
    up = jnp.ones((1, 2, 16, 32))
    with pytest.raises(NotImplementedError, match=message):
        checked_expert_mlp(jnp.ones((2, 32)), up, packed(32, 16), int32([2]), backend="triton")


def test_rows_of_float64_are_refused() -> None:
    with jax.enable_x64(True):
        rows, matrices = jnp.ones((2, 32), jnp.float64), jnp.ones((1, 4, 32), jnp.float64)
        with pytest.raises(NotImplementedError, match="bfloat16, float16 and float32; got float64"):
            checked_grouped_matmul(rows, matrices, int32([2]), backend="triton")
