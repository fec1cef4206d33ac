"""Gradients of every backend of the table against those that JAX derives of the dense oracle."""

import re
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.grouped_matmul import ACTIVATIONS, BACKENDS, expert_mlp, grouped_matmul
from tests.support.covering import pairs
from tests.support.kernels import REGIMES, D, F, G, arrays, each_regime, int32, mlp_arrays, poison
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=4)

# "reference" is what the others are compared with.
BACKEND_NAMES = sorted(BACKENDS.keys() - {"reference"})
each_backend = pytest.mark.parametrize("backend", BACKEND_NAMES)
# Activation, limit, and whether there is a gate.
FUNCTIONS = [
    *product(ACTIVATIONS, [None], [True, False]),
    ("clamped_swiglu", 0.7, True),
    ("limited_swiglu", 0.7, True),
    ("capped_swiglu", 0.3, True),
]


@partial(jax.jit, static_argnames=("backend", "activation", "limit"))
def mlp_gradients(x_RD, w_up, w_down, biases, sizes, dy_RD, *, backend, activation="silu", limit=None):
    """Gradients of Σ dy · y in x, matrices and biases (a dict of arguments)."""

    def mlp(x_RD, w_up, w_down, biases):
        return expert_mlp(x_RD, w_up, w_down, sizes, **biases, activation=activation, limit=limit, backend=backend)

    _, pullback = jax.vjp(mlp, x_RD, w_up, w_down, biases)
    return pullback(dy_RD)


def assert_same(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=5e-6)


def check_mlp_gradients(backend, R, sizes):
    """What stands in rows that no group owns, of x as of dy, reaches no gradient."""
    x_RD, *weights = mlp_arrays(R)
    (dy_RD,) = arrays((R, D), seed=7)
    expected = mlp_gradients(x_RD, *weights, {}, int32(sizes), dy_RD, backend="reference")
    poisoned = poison(x_RD, sizes), *weights, {}, int32(sizes), poison(dy_RD, sizes)
    actual = mlp_gradients(*poisoned, backend=backend)
    assert_same(actual, expected)
    np.testing.assert_array_equal(actual[0][int(np.sum(sizes)) :], 0)
    for dw in actual[1:3]:
        np.testing.assert_array_equal(dw[np.asarray(sizes) == 0], 0)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("function", "backend", "R"), pairs(FUNCTIONS, BACKEND_NAMES, [*REGIMES.values()]), ids=str)
def test_every_expert_function(function, backend, R):
    activation, limit, gated = function
    sizes, halves = [R // 3, 0, 4, 1, 0, 3], 2 if gated else 1
    x_RD, w_up, w_down, b_up, b_down, dy_RD = arrays(
        (R, D), (G, halves, F, D), (G, D, F), (G, halves, F), (G, D), (R, D), seed=5
    )
    inputs = x_RD * 7, w_up, w_down, {"b_gate_up_p2F": b_up, "b_down_pD": b_down}, int32(sizes), dy_RD
    options = {"activation": activation, "limit": limit}
    assert_same(
        mlp_gradients(*inputs, backend=backend, **options), mlp_gradients(*inputs, backend="reference", **options)
    )


@pytest.mark.full
@each_backend
@each_regime
def test_all_patterns_of_empty_groups(backend, R):
    for pattern in product([0, 1], repeat=G):
        check_mlp_gradients(backend, R, np.array(pattern) * (R // G))


@pytest.mark.full
@each_regime
def test_the_oracle_keeps_to_it_too(R):
    check_mlp_gradients("reference", R, np.array([2, 0, 4, 1, 0, 3]))


@each_backend
@each_regime
@pytest.mark.parametrize("group", [0, 3, G - 1])
def test_all_rows_to_one_group(backend, R, group):
    check_mlp_gradients(backend, R, R * np.eye(G, dtype=int)[group])


@pytest.mark.covering(most=1)
@each_backend
@each_regime
@settings(max_examples=25)
@given(data=st.data())
def test_random_group_sizes(backend, R, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, R), min_size=G, max_size=G)))
    check_mlp_gradients(backend, R, np.diff([0, *cuts]))


@each_backend
@pytest.mark.parametrize(
    ("sizes", "R", "N", "K"),
    [
        ([1], 1, 1, 1),
        ([13], 17, 5, 10),
        ([1, 0, 2], 5, 3, 24),
        ([20, 0, 13], 37, 3, 10),
        ([0, 3, 2, 0], 5, 7, 32),
        ([0, 0], 4, 3, 16),
        ([0, 0], 0, 3, 16),
    ],
)
def test_edge_shapes(backend, sizes, R, N, K):
    lhs_RK, rhs_GNK, dout_RN = arrays((R, K), (len(sizes), N, K), (R, N), seed=1)

    def gradients(lhs_RK, rhs_GNK, dout_RN, backend):
        _, pullback = jax.vjp(lambda lhs, rhs: grouped_matmul(lhs, rhs, int32(sizes), backend=backend), lhs_RK, rhs_GNK)
        return pullback(dout_RN)

    actual, expected = (
        jax.jit(gradients, static_argnames="backend")(lhs_RK, rhs_GNK, dout_RN, backend=name)
        for name in (backend, "reference")
    )
    assert_same(actual, expected)


@each_backend
@each_regime
def test_bfloat16_rounds_once(backend, R):
    """Sums over rows are float32: the gradients are those of float32 inputs, rounded at the end."""
    sizes = np.full(G, R // G)
    x_RD, *weights = mlp_arrays(R, jnp.bfloat16)
    (dy_RD,) = arrays((R, D), dtype=jnp.bfloat16, seed=7)
    narrow = mlp_gradients(x_RD, *weights, {}, int32(sizes), dy_RD, backend=backend)
    wide = [a.astype(jnp.float32) for a in (x_RD, *weights)]
    exact = mlp_gradients(*wide, {}, int32(sizes), dy_RD.astype(jnp.float32), backend="reference")
    for a, e in zip(narrow[:3], exact[:3], strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), e, rtol=2**-8, atol=1e-5)


@pytest.mark.covering(most=1)
@each_backend
@each_regime
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(backend, R, check_vma):
    """Experts over ep, F over tp, rows over dp and ep: the matrices' gradients add up over dp, the rows' over tp."""
    dp, tp, ep = mesh_shape = 2, 2, 2
    x_RD, w_up, w_down = mlp_arrays(R, groups=2 * ep)
    dy_RD, x_deRD = arrays((R, D), (dp, ep, R, D), seed=7)
    sizes = np.array([[[3, 0], [R - 4, 4]], [[0, 0], [5, 1]]])

    def local(x_11RD, w_up, w_down, sizes_11p, dy_RD):
        y_RD = jax.lax.psum(expert_mlp(x_11RD[0, 0], w_up, w_down, sizes_11p[0, 0], backend=backend), "tp")
        return jnp.sum(y_RD * dy_RD)[None, None]

    summed = jax.shard_map(
        local,
        mesh=mesh_of(*mesh_shape),
        in_specs=(P("dp", "ep"), P("ep", None, "tp"), P("ep", None, "tp"), P("dp", "ep"), P()),
        out_specs=P("dp", "ep"),
        check_vma=check_vma,
    )
    actual = jax.jit(jax.grad(lambda *w: jnp.sum(summed(*w, int32(sizes), dy_RD)), (0, 1, 2)))(x_deRD, w_up, w_down)

    dx_deRD, dw_up, dw_down = np.zeros(x_deRD.shape), np.zeros(w_up.shape), np.zeros(w_down.shape)
    for d, e in product(range(dp), range(ep)):
        own = slice(2 * e, 2 * e + 2)
        dx, du, dd, _ = mlp_gradients(
            x_deRD[d, e], w_up[own], w_down[own], {}, int32(sizes[d, e]), dy_RD, backend="reference"
        )
        dx_deRD[d, e] = dx
        dw_up[own] += du
        dw_down[own] += dd
    for a, e in zip(actual, (dx_deRD, dw_up, dw_down), strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("R", REGIMES.values(), ids=REGIMES)
def test_the_stack_is_never_transposed(R):
    """No array of the compiled gradient has the stack's shape with its matrices transposed."""
    groups, N, K = 3, 7, 32
    lhs_RK, rhs_GNK = arrays((R, K), (groups, N, K), seed=2)

    def loss(lhs, rhs):
        return jnp.sum(grouped_matmul(lhs, rhs, int32([2, 0, 5])) ** 2)

    hlo = jax.jit(jax.grad(loss, (0, 1))).lower(lhs_RK, rhs_GNK).compile().as_text()
    assert f"f32[{groups},{N},{K}]" in hlo
    assert not re.search(rf"f32\[{groups},{K},{N}\]", hlo)
    assert not re.search(rf"f32\[{groups},{N},{K}\]{{1,2,0", hlo)
