"""Every backend of the table against the dense oracle, and what the portable backend promises about cost."""

import math
import re
from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.grouped_matmul import ACTIVATIONS, BACKENDS, expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.row_loops import map_rows, map_tiles, rows_per_tile
from tests.support.kernels import REGIMES, D, F, G, arrays, each_regime, int32, mlp_arrays, poison
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=5)

each_backend = pytest.mark.parametrize("backend", BACKENDS)


# One compiled function a backend and shape: compiling is what costs here, so tests vary the group sizes only.
@cache
def compiled(function, backend, **options):
    return jax.jit(partial(function, backend=backend, **options))


def assert_close(actual, expected, sizes):
    """Equal where a group owns the row, zero where none does."""
    filled = int(np.sum(sizes))
    np.testing.assert_allclose(actual[:filled], expected[:filled], rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(actual[filled:], 0)


def check_against_reference(backend, R, sizes):
    x_RD, *weights = mlp_arrays(R)
    expected = compiled(expert_mlp, "reference")(x_RD, *weights, int32(sizes))
    actual = compiled(expert_mlp, backend)(poison(x_RD, sizes), *weights, int32(sizes))
    assert_close(actual, expected, sizes)


def test_reference_is_a_loop_over_rows():
    sizes = [2, 0, 4, 1, 0, 3]
    x_RD, w_gate_up, w_down = (np.asarray(a, np.float64) for a in mlp_arrays(12))
    y_RD = np.zeros((12, D))
    for r, g in enumerate(np.repeat(np.arange(G), sizes)):
        gate, up = w_gate_up[g] @ x_RD[r]
        y_RD[r] = w_down[g] @ (gate / (1 + np.exp(-gate)) * up)
    assert_close(compiled(expert_mlp, "reference")(*mlp_arrays(12), int32(sizes)), y_RD, sizes)


@each_backend
@each_regime
@pytest.mark.parametrize(
    ("activation", "limit", "gated"),
    [
        *product(["silu", "relu2"], [None], [True, False]),
        ("clamped_swiglu", 0.7, True),
        ("limited_swiglu", 0.7, True),
        ("capped_swiglu", 0.3, True),
        ("situ", 0.3, True),
    ],
)
def test_biases_and_other_expert_functions(backend, R, activation, limit, gated):
    sizes, halves = [R // 3, 0, 3, 1, 0, 3], 2 if gated else 1  # the last row is of no group
    x_RD, w_up, w_down, b_up, b_down = arrays((R, D), (G, halves, F, D), (G, D, F), (G, halves, F), (G, D), seed=5)
    mlp = compiled(expert_mlp, backend, activation=activation, limit=limit)
    actual = mlp(poison(x_RD, sizes), w_up, w_down, int32(sizes), b_gate_up_p2F=b_up, b_down_pD=b_down)
    x_RD, w_up, w_down, b_up, b_down = (np.asarray(a, np.float64) for a in (x_RD, w_up, w_down, b_up, b_down))
    y_RD = np.zeros((R, D))
    for r, g in enumerate(np.repeat(np.arange(G), sizes)):
        halves_F = w_up[g] @ x_RD[r] + b_up[g]
        if activation in ("clamped_swiglu", "limited_swiglu"):
            gate, up = np.minimum(halves_F[0], limit), np.clip(halves_F[1], -limit, limit)
            more, slope = (1, 1.702) if activation == "clamped_swiglu" else (0, 1)
            h_F = (up + more) * gate / (1 + np.exp(-slope * gate))
        elif activation == "capped_swiglu":
            h_F = np.minimum(halves_F[0] / (1 + np.exp(-halves_F[0])), limit) * np.clip(halves_F[1], -limit, limit)
        elif activation == "situ":
            gate, up = halves_F
            h_F = limit * np.tanh(gate / limit) / (1 + np.exp(-gate)) * 25 * np.tanh(up / 25)
        else:
            first = halves_F[0]
            h_F = first / (1 + np.exp(-first)) if activation == "silu" else np.maximum(first, 0) ** 2
            h_F = h_F * halves_F[1] if gated else h_F
        y_RD[r] = w_down[g] @ h_F + b_down[g]
    assert_close(actual, y_RD, sizes)


@each_backend
@each_regime
def test_all_patterns_of_empty_groups(backend, R):
    for pattern in product([0, 1], repeat=G):
        check_against_reference(backend, R, np.array(pattern) * (R // G))


@each_backend
@each_regime
@pytest.mark.parametrize("group", [0, 3, G - 1])
def test_all_rows_to_one_group(backend, R, group):
    check_against_reference(backend, R, R * np.eye(G, dtype=int)[group])


@each_backend
@each_regime
@settings(max_examples=25)
@given(data=st.data())
def test_random_group_sizes(backend, R, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, R), min_size=G, max_size=G)))
    check_against_reference(backend, R, np.diff([0, *cuts]))


@pytest.mark.covering
@each_backend
@pytest.mark.parametrize(
    ("sizes", "R", "N", "K"),
    [
        ([1], 1, 1, 1),
        ([13], 17, 5, 10),
        ([1, 0, 2], 5, 3, 1),
        ([1, 0, 2], 5, 3, 24),  # half a vector of lanes left over
        ([1, 0, 2], 5, 3, 1040),  # two blocks of lanes and a rest
        ([1, 0, 2], 5, 3, 1552),  # three, which are a loop, and a rest
        ([20, 0, 13], 37, 3, 10),
        ([0, 3, 2, 0], 5, 7, 32),  # nothing beyond the last group
        ([0, 0], 4, 3, 16),
        ([0, 0], 0, 3, 16),
    ],
)
def test_edge_shapes(backend, sizes, R, N, K):
    lhs_RK, rhs_GNK = arrays((R, K), (len(sizes), N, K), seed=1)
    expected = compiled(grouped_matmul, "reference")(lhs_RK, rhs_GNK, int32(sizes))
    actual = compiled(grouped_matmul, backend)(poison(lhs_RK, sizes), rhs_GNK, int32(sizes))
    assert_close(actual, expected, sizes)


@each_backend
@each_regime
def test_sizes_beyond_the_rows_are_cut_off(backend, R):
    x_RD, *weights = mlp_arrays(R)
    cut, beyond = (
        compiled(expert_mlp, backend)(x_RD, *weights, int32([R - 3, last, 0, 0, 0, 9 * last])) for last in (3, 9)
    )
    np.testing.assert_array_equal(beyond, cut)


@each_backend
@each_regime
def test_bfloat16_is_as_exact_as_a_dense_loop(backend, R):
    """Root mean square error against float32 within 1.1 of the dense loop's: both round h and y once to bfloat16."""
    sizes = np.full(G, R // G)
    inputs = mlp_arrays(R, jnp.bfloat16)
    exact = compiled(expert_mlp, "reference")(*(a.astype(jnp.float32) for a in inputs), int32(sizes))
    dense, actual = (compiled(expert_mlp, name)(*inputs, int32(sizes)) for name in ("reference", backend))
    assert actual.dtype == jnp.bfloat16
    error, dense_error = (float(jnp.linalg.norm(y.astype(jnp.float32) - exact)) for y in (actual, dense))
    assert error <= 1.1 * dense_error


@each_backend
@each_regime
def test_out_dtype_keeps_the_float32_sums(backend, R):
    sizes = np.full(G, R // G)
    inputs = mlp_arrays(R, jnp.bfloat16)
    wide = compiled(expert_mlp, backend, out_dtype=jnp.float32)(*inputs, int32(sizes))
    assert wide.dtype == jnp.float32
    narrow = compiled(expert_mlp, backend)(*inputs, int32(sizes))
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)


@pytest.mark.covering(most=2)
@each_backend
@each_regime
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(backend, R, check_vma):
    """Experts over ep, F over tp; each ep rank has its own rows, its own sizes and a poisoned tail."""
    tp, ep = 2, 4
    sizes = np.array([[3, 0], [0, 0], [R - 4, 4], [0, 1]])
    x_RD, *weights = mlp_arrays(R, groups=2 * ep)
    x_eRD = jnp.stack([poison(x_RD, s) for s in sizes])

    def local(x_1RD, w_gate_up, w_down, sizes_p):
        return jax.lax.psum(expert_mlp(x_1RD[0], w_gate_up, w_down, sizes_p, backend=backend), "tp")[None]

    y_eRD = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh_of(1, tp, ep),
            in_specs=(P("ep"), P("ep", None, "tp"), P("ep", None, "tp"), P("ep")),
            out_specs=P("ep"),
            check_vma=check_vma,
        )
    )(x_eRD, *weights, int32(sizes.reshape(-1)))
    for e, s in enumerate(sizes):
        local_weights = [w[2 * e : 2 * e + 2] for w in weights]
        expected = compiled(expert_mlp, "reference")(x_RD, *local_weights, int32(s))
        assert_close(y_eRD[e], expected, s)


@pytest.mark.covering(most=1)
@each_backend
def test_inside_a_while_loop(backend):
    x_RD, *weights = mlp_arrays(23)
    sizes_sG = int32([[1, 2, 3, 4, 5, 6], [0, 20, 0, 0, 1, 0]])

    @jax.jit
    def both(x_RD):
        def body(carry):
            step, x_RD = carry
            return step + 1, expert_mlp(x_RD, *weights, sizes_sG[step], backend=backend)

        return jax.lax.while_loop(lambda carry: carry[0] < 2, body, (0, x_RD))[1]

    expected = x_RD
    for sizes_G in sizes_sG:
        expected = compiled(expert_mlp, "reference")(expected, *weights, sizes_G)
    assert_close(both(x_RD), expected, sizes_sG[-1])


def test_activations():
    x = np.linspace(-3, 3, 13)
    erf = np.array([math.erf(v / math.sqrt(2)) for v in x])
    expected = {
        "silu": x / (1 + np.exp(-x)),
        "gelu": x * (1 + erf) / 2,
        "gelu_tanh": x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "gelu_pytorch_tanh": x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": np.maximum(x, 0),
        "relu2": np.maximum(x, 0) ** 2,
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, activation in ACTIVATIONS.items():
        np.testing.assert_allclose(activation(jnp.asarray(x, jnp.float32)), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("R", "groups", "tile"), [(1, 1, 1), (8, 64, 1), (128, 64, 1), (129, 64, 8), (5, 1, 5)])
def test_small_tiles(R, groups, tile):
    assert rows_per_tile(R, groups) == tile


@pytest.mark.parametrize(("R", "groups", "tile"), [(4096, 64, 40), (1024, 64, 8), (10**6, 8, 128), (1500, 64, 8)])
def test_large_tiles(R, groups, tile):
    assert rows_per_tile(R, groups) == tile


@pytest.mark.parametrize(("R", "groups"), [(60, 30), (60, 3), (240, 3)])
def test_trips_follow_the_filled_rows(R, groups):
    """Neither the rows allocated nor the groups left empty add a tile."""
    sizes = np.zeros(groups, int)
    sizes[[0, groups - 1]] = 9, 11
    loaded, tiles = [], []

    def load(group):
        loaded.append(int(group))
        return group

    def tile_fn(group, x_mK):
        tiles.append(int(group))
        return x_mK

    args = jnp.ones((R, 2)), int32(sizes), jax.ShapeDtypeStruct((R, 2), jnp.float32)
    m = rows_per_tile(R, groups)
    with jax.disable_jit():
        if m == 1:
            map_rows(tile_fn, *args, varying=frozenset())
        else:
            map_tiles(load, tile_fn, *args, varying=frozenset())
            assert loaded == [0, groups - 1]
    np.testing.assert_array_equal(tiles, np.repeat(np.arange(groups), np.ceil(sizes / m).astype(int)))


def portable_hlo(R, groups, N, K):
    lhs_RK, rhs_GNK = arrays((R, K), (groups, N, K), seed=2)
    return compiled(grouped_matmul, "portable").lower(lhs_RK, rhs_GNK, int32(np.zeros(groups))).compile().as_text()


@pytest.mark.parametrize("R", [60, 300], ids=REGIMES)
def test_no_product_of_rows_and_groups(R):
    """No array of the compiled program, not even a mask, has as many elements as rows × groups."""
    groups, N, K = 50, 3, 16
    sizes = [
        math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", portable_hlo(R, groups, N, K))
    ]
    assert groups * N * K in sizes
    assert max(sizes) < R * groups


def test_few_rows_copy_no_matrix():
    """A slice of the stack never becomes an array of its own: the loop over lanes reads it in place."""
    hlo = portable_hlo(20, 10, 7, 96)
    assert "dynamic-slice" in hlo
    assert not re.search(r"f32\[(1,)?7,96\]", hlo)


@pytest.mark.parametrize("R", [60, 300], ids=REGIMES)
def test_bfloat16_results_are_not_converted_whole(R):
    """A trip of a loop writes the rows at hand, and never all of them in float32 and back."""
    groups, N, K = 50, 7, 96
    lhs_RK, rhs_GNK = arrays((R, K), (groups, N, K), dtype=jnp.bfloat16, seed=2)
    product = compiled(grouped_matmul, "portable")
    hlo = product.lower(lhs_RK, rhs_GNK, int32(np.zeros(groups))).compile().as_text()
    assert f"u16[{R},{N}]" in hlo
    assert f"f32[{R},{N}]" not in hlo


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("D", [64, 1024, 1552], ids="{} inputs".format)
@pytest.mark.parametrize("R", [60, 300], ids=REGIMES)
def test_bfloat16_stacks_are_not_converted_whole(R, D):
    """XLA for CPU may compute bfloat16 in float32, but only of the group at hand: forward or in the gradient."""
    groups, F = 50, 64  # inputs are one block of lanes, two, and three with a rest
    x_RD, up, down = arrays((R, D), (groups, 2, F, D), (groups, D, F), dtype=jnp.bfloat16, seed=2)

    def loss(x_RD, up, down, sizes):
        return jnp.sum(expert_mlp(x_RD, up, down, sizes, backend="portable").astype(jnp.float32))

    for function in (loss, jax.grad(loss)):
        memory = jax.jit(function).lower(x_RD, up, down, int32(np.zeros(groups))).compile().memory_analysis()
        # The smaller stack alone would be 4·G·D·F bytes, 819 kB.
        assert memory.temp_size_in_bytes < 2 * groups * D * F


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, r"backend must be 'auto' or one of \[.*'portable', 'reference'.*got 'cuda'"),
        ({"lhs_RK": jnp.ones(3)}, r"lhs must have 2 dimensions, \[R, K\]; got shape \(3,\)"),
        ({"lhs_RK": jnp.ones((3, 4), int)}, "rows must be floating point; got int32.*astype"),
        ({"rhs_GNK": jnp.ones((2, 4, 5))}, r"rhs must have shape \(2, 4, 4\) to fit.*got \(2, 4, 5\).*transpose"),
        ({"rhs_GNK": jnp.ones((3, 5, 4))}, r"rhs must have shape \(2, 5, 4\) to fit.*2 groups; got \(3, 5, 4\)"),
        ({"rhs_GNK": jnp.ones((2, 5, 4), jnp.bfloat16)}, "rhs must have the dtype of the rows, float32; got bfloat16"),
        ({"group_sizes_G": jnp.ones(2)}, "group_sizes must be int32; got float32.*astype"),
    ],
)
def test_grouped_matmul_refuses(change, message):
    arguments = {"lhs_RK": jnp.ones((3, 4)), "rhs_GNK": jnp.ones((2, 5, 4)), "group_sizes_G": int32([1, 2])}
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, r"activation must be one of .*'gelu', .*got 'swish'"),
        (
            {"w_gate_up_p2FD": jnp.ones((2, 10, 4))},
            r"w_gate_up must have 4 dimensions, \[p, 2, F, D\]; got.*\(2, 10, 4\)",
        ),
        ({"w_gate_up_p2FD": jnp.ones((2, 2, 4, 5))}, r"w_gate_up must have shape \(2, 2, 5, 4\).*got \(2, 2, 4, 5\)"),
        ({"w_down_pDF": jnp.ones((2, 3, 5))}, r"w_down must have shape \(2, 4, 5\).*got \(2, 3, 5\)"),
    ],
)
def test_expert_mlp_refuses(change, message):
    arguments = {
        "x_RD": jnp.ones((3, 4)),
        "w_gate_up_p2FD": jnp.ones((2, 2, 5, 4)),
        "w_down_pDF": jnp.ones((2, 4, 5)),
        "group_sizes_p": int32([1, 2]),
    }
    with pytest.raises(ValueError, match=message):
        expert_mlp(**arguments | change)
