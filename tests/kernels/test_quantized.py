"""Packed matrices as inputs of the grouped products, against float64 sums of numbers that numpy and ml_dtypes decode."""

import dataclasses
import re
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmoe.kernels.grouped_matmul import BACKENDS, QuantizedStack, expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.backends import GPU_BACKENDS
from jaxmoe.kernels.grouped_matmul.quantized import FORMATS
from tests.support.covering import pairs
from tests.support.kernels import REGIMES, each_regime, int32, poison
from tests.support.meshes import mesh_of
from tests.support.packed import CASES, OF_EACH_FORMAT, Case, D, F, G, each_case, pack

pytestmark = pytest.mark.covering(most=3)

one_case_a_format = pytest.mark.parametrize("case", OF_EACH_FORMAT, ids=str)
# These take every format; what a GPU takes is tested with its kernel.
TAKE_THEM = [name for name, backend in BACKENDS.items() if backend.formats]
each_backend = pytest.mark.parametrize("backend", TAKE_THEM)


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# One compiled function a backend and variant; the shapes and formats of its arguments add more.
@cache
def compiled(function, backend, **options):
    return jax.jit(partial(function, backend=backend, **options))


def group_patterns(R):
    """Uneven with empty groups and fewer rows than a tile, one group of all, all empty, none left over."""
    yield [R // 3, 0, 4, 1, 0, 3]
    yield [0, 0, R, 0, 0, 0]
    yield [0] * G
    yield [1, R - 5, 0, 0, 3, 1]


def assert_close(actual, expected, sizes, tolerance=1e-5):
    """Equal up to a share of the largest number where a group owns the row, zero where none does."""
    filled = int(np.sum(sizes))
    actual = np.asarray(actual, np.float64)
    np.testing.assert_allclose(
        actual[:filled], expected[:filled], rtol=tolerance, atol=tolerance * np.abs(expected).max(initial=1e-9)
    )
    np.testing.assert_array_equal(actual[filled:], 0)


def product_oracle(lhs_RK, rhs_GNK, sizes):
    lhs_RK, out_RN = np.asarray(lhs_RK, np.float64), np.zeros((len(lhs_RK), rhs_GNK.shape[1]))
    for r, g in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        out_RN[r] = rhs_GNK[g] @ lhs_RK[r]
    return out_RN


def silu(x):
    return x / (1 + np.exp(-x))


def clamped_swiglu(gate, up):
    gate, up = np.minimum(gate, 0.7), np.clip(up, -0.7, 0.7)
    return (up + 1) * gate / (1 + np.exp(-1.702 * gate))


class Variant(NamedTuple):
    """An expert function: its options, and the same in numpy."""

    halves: int
    biases: bool
    options: dict
    combine: object


VARIANTS = {
    "gated": Variant(2, False, {}, lambda gate, up: silu(gate) * up),
    "gated, biases": Variant(2, True, {}, lambda gate, up: silu(gate) * up),
    "ungated, biases": Variant(1, True, {"activation": "relu2"}, lambda up: np.maximum(up, 0) ** 2),
    "clamped, biases": Variant(2, True, {"activation": "clamped_swiglu", "limit": 0.7}, clamped_swiglu),
}


def mlp_inputs(variant, case_up, case_down):
    """Stacks and biases of G experts, as arguments and as float64. A case of None is a stack that is not packed."""
    shapes = (G, variant.halves, F, D), (G, D, F)
    stacks, exact = [], []
    for seed, (case, shape) in enumerate(zip((case_up, case_down), shapes, strict=True)):
        stack = normal(seed, *shape) if case is None else None
        packed = (stack, np.asarray(stack, np.float64)) if case is None else pack(case, seed, *shape)
        stacks.append(packed[0])
        exact.append(packed[1])
    biases = {}
    if variant.biases:
        biases = {"b_gate_up_p2F": normal(2, G, variant.halves, F), "b_down_pD": normal(3, G, D)}
    return stacks, exact, biases


def mlp_oracle(x_RD, exact, biases, sizes, combine):
    (w_up, w_down), x_RD = exact, np.asarray(x_RD, np.float64)
    b_up, b_down = (np.asarray(b, np.float64) for b in biases.values()) if biases else (np.zeros(G), np.zeros(G))
    y_RD = np.zeros_like(x_RD)
    for r, g in enumerate(np.repeat(np.arange(G), sizes)):
        y_RD[r] = w_down[g] @ combine(*(w_up[g] @ x_RD[r] + b_up[g])) + b_down[g]
    return y_RD


@each_backend
@each_regime
@each_case
def test_grouped_matmul(case, R, backend):
    rhs_GNK, exact = pack(case, 0, G, F, D)
    lhs_RK = normal(9, R, D)
    for sizes in group_patterns(R):
        actual = compiled(grouped_matmul, backend)(poison(lhs_RK, sizes), rhs_GNK, int32(sizes))
        assert_close(actual, product_oracle(lhs_RK, exact, sizes), sizes)


# The products are those above, whatever is done between them.
@pytest.mark.parametrize(
    ("case", "name", "R", "backend"), pairs(OF_EACH_FORMAT, [*VARIANTS], [*REGIMES.values()], TAKE_THEM), ids=str
)
def test_expert_mlp(case, name, R, backend):
    variant = VARIANTS[name]
    stacks, exact, biases = mlp_inputs(variant, case, case)
    x_RD = normal(9, R, D)
    for sizes in group_patterns(R):
        function = compiled(expert_mlp, backend, **variant.options)
        actual = function(poison(x_RD, sizes), *stacks, int32(sizes), **biases)
        assert_close(actual, mlp_oracle(x_RD, exact, biases, sizes, variant.combine), sizes)


@each_backend
@each_regime
@pytest.mark.parametrize("cases", [(CASES[0], None), (None, CASES[4]), (CASES[2], CASES[9]), (CASES[12], CASES[11])])
def test_each_stack_may_be_packed_its_own_way(cases, R, backend):
    variant, sizes = VARIANTS["gated, biases"], [R // 3, 0, 4, 1, 0, 3]
    stacks, exact, biases = mlp_inputs(variant, *cases)
    x_RD = normal(9, R, D)
    actual = compiled(expert_mlp, backend)(x_RD, *stacks, int32(sizes), **biases)
    assert_close(actual, mlp_oracle(x_RD, exact, biases, sizes, variant.combine), sizes)


@pytest.mark.covering(most=3)
@each_backend
@pytest.mark.parametrize(
    ("case", "sizes", "R", "N", "K"),
    [
        (Case("float8_e4m3fn", (1, 0)), [1, 0, 2], 5, 3, 1040),  # two blocks of lanes and a rest
        (Case("float8_e4m3fn", (1, 0)), [1, 0, 2], 5, 3, 1552),  # three, which are a loop, and a rest
        (Case("int4", (1, 32), zero_points=True), [1, 0, 2], 5, 3, 2112),
        (Case("mxfp4", (1, 32)), [1, 0, 2], 5, 3, 2112),
        (Case("nvfp4", (1, 16), matrix_scales=True), [1, 0, 2], 5, 3, 2112),
        (Case("nvfp4", (1, 8)), [1, 0, 2], 5, 3, 48),
        (Case("int4", (1, 16)), [1, 0, 2], 5, 3, 48),  # half a vector of lanes
        (Case("float8_e4m3fn", (1, 1)), [13], 17, 5, 10),
        (Case("float8_e4m3fn", (0, 0)), [1], 1, 1, 1),
        (Case("int4", (1, 2)), [0, 3, 2, 0], 5, 7, 2),
        (Case("mxfp4", (1, 32)), [0, 0], 0, 3, 32),
        (Case("mxfp4", (1, 32)), [20, 0, 13], 37, 3, 64),
    ],
    ids=str,
)
def test_edge_shapes(case, sizes, R, N, K, backend):
    rhs_GNK, exact = pack(case, 0, len(sizes), N, K)
    lhs_RK = normal(9, R, K)
    actual = compiled(grouped_matmul, backend)(poison(lhs_RK, sizes), rhs_GNK, int32(sizes))
    assert_close(actual, product_oracle(lhs_RK, exact, sizes), sizes)


@pytest.mark.covering(most=1)
@each_backend
@each_regime
@one_case_a_format
def test_bfloat16_rows_meet_decoded_float32(case, R, backend):
    """Neither the decoded matrix nor a partial sum is rounded to bfloat16, only the result."""
    rhs_GNK, exact = pack(case, 0, G, F, D)
    lhs_RK, sizes = normal(9, R, D, dtype=jnp.bfloat16), [R // 3, 0, 4, 1, 0, 3]
    expected = product_oracle(lhs_RK, exact, sizes)
    wide = compiled(grouped_matmul, backend, out_dtype=jnp.float32)(lhs_RK, rhs_GNK, int32(sizes))
    assert_close(wide, expected, sizes)
    narrow = compiled(grouped_matmul, backend)(lhs_RK, rhs_GNK, int32(sizes))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("case", "check_vma", "R"), pairs(CASES, [True, False], [*REGIMES.values()]), ids=str)
def test_inside_shard_map(case, check_vma, R):
    """Experts over ep, F over tp: a device has whole blocks with their scales, or a part of one with its scale."""
    tp, ep = 2, 4
    mesh = mesh_of(1, tp, ep)
    (w_up, exact_up), (w_down, exact_down) = pack(case, 0, 2 * ep, 2, F, D), pack(case, 1, 2 * ep, D, F)

    def specs(stack, values):
        over_tp = values.index("tp")
        one_block = stack.scales.shape[over_tp] == 1
        scales = P(*(None if one_block and axis == "tp" else axis for axis in values))
        return dataclasses.replace(
            stack,
            values=values,
            scales=scales,
            zero_points=None if stack.zero_points is None else scales,
            matrix_scales=None if stack.matrix_scales is None else P(*values[:-2]),
        )

    stacks = w_up, w_down
    stack_specs = specs(w_up, P("ep", None, "tp", None)), specs(w_down, P("ep", None, "tp"))
    stacks = jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), stacks, stack_specs)
    assert stacks[0].values.addressable_shards[0].data.shape == (2, 2, F // tp, w_up.values.shape[3])
    assert stacks[1].values.addressable_shards[0].data.shape == (2, D, w_down.values.shape[2] // tp)
    sizes = np.array([[3, 0], [0, 0], [R - 4, 4], [0, 1]])
    x_RD = normal(9, R, D)

    def local(x_1RD, w_up, w_down, sizes_p):
        return jax.lax.psum(expert_mlp(x_1RD[0], w_up, w_down, sizes_p), "tp")[None]

    y_eRD = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P("ep"), *stack_specs, P("ep")),
            out_specs=P("ep"),
            check_vma=check_vma,
        )
    )(jnp.stack([poison(x_RD, s) for s in sizes]), *stacks, int32(sizes.reshape(-1)))
    for e, s in enumerate(sizes):
        expected = np.zeros((R, D))
        for r, g in enumerate(np.repeat([2 * e, 2 * e + 1], s)):
            gate, up = exact_up[g] @ np.asarray(x_RD[r], np.float64)
            expected[r] = exact_down[g] @ (silu(gate) * up)
        assert_close(y_eRD[e], expected, s)


@partial(jax.jit, static_argnames=("backend", "options"))
def mlp_gradients(x_RD, stacks, biases, sizes, dy_RD, *, backend, options):
    """Gradients of Σ dy · y in rows, in the stacks that are not packed, and in biases."""
    dense = [None if isinstance(stack, QuantizedStack) else stack for stack in stacks]

    def mlp(x_RD, dense, biases):
        both = [stack if own is None else own for stack, own in zip(stacks, dense, strict=True)]
        return expert_mlp(x_RD, *both, sizes, **biases, backend=backend, **dict(options))

    _, pullback = jax.vjp(mlp, x_RD, dense, biases)
    return pullback(dy_RD)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("cases", "name", "R"),
    pairs(
        [(CASES[0], CASES[0]), (CASES[4], CASES[9]), (CASES[5], None)],
        [*VARIANTS],
        [*REGIMES.values()],
    ),
    ids=lambda value: " and ".join(map(str, value)) if isinstance(value, tuple) else str(value),
)
def test_gradients(cases, name, R):
    """Those that JAX derives of the dense oracle, in rows, biases and a matrix that is not packed."""
    variant = VARIANTS[name]
    stacks, exact, biases = mlp_inputs(variant, *cases)
    x_RD, dy_RD = normal(9, R, D), normal(10, R, D)
    options = tuple(variant.options.items())
    decoded = [jnp.asarray(stack, jnp.float32) for stack in exact]
    for sizes in group_patterns(R):
        dx, (du, dd), db = mlp_gradients(
            x_RD, decoded, biases, int32(sizes), dy_RD, backend="reference", options=options
        )
        expected = dx, [None if case else d for case, d in zip(cases, (du, dd), strict=True)], db
        poisoned = poison(x_RD, sizes), stacks, biases, int32(sizes), poison(dy_RD, sizes)
        actual = mlp_gradients(*poisoned, backend="portable", options=options)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert a.dtype == e.dtype
            np.testing.assert_allclose(a, e, rtol=2e-5, atol=2e-5 * float(jnp.abs(e).max()))


@pytest.mark.full
@each_regime
def test_gradient_of_rows_inside_shard_map(R):
    """Rows over dp and ep; the gradient of a row adds up over tp."""
    dp, tp, ep = 2, 2, 2
    (w_up, exact_up), (w_down, exact_down) = pack(CASES[0], 0, 2 * ep, 2, F, D), pack(CASES[0], 1, 2 * ep, D, F)
    x_deRD, dy_RD = normal(9, dp, ep, R, D), normal(10, R, D)
    sizes = np.array([[[3, 0], [R - 4, 4]], [[0, 0], [5, 1]]])

    def local(x_11RD, w_up, w_down, sizes_11p):
        y_RD = jax.lax.psum(expert_mlp(x_11RD[0, 0], w_up, w_down, sizes_11p[0, 0]), "tp")
        return jnp.sum(y_RD * dy_RD)[None, None]

    def loss(x_deRD, w_up, w_down):
        rows, weights = P("dp", "ep"), P("ep", None, "tp")
        summed = jax.shard_map(local, mesh=mesh_of(dp, tp, ep), in_specs=(rows, weights, weights, rows), out_specs=rows)
        return jnp.sum(summed(x_deRD, w_up, w_down, int32(sizes)))

    actual = jax.jit(jax.grad(loss))(x_deRD, w_up, w_down)
    for d, e in np.ndindex(dp, ep):
        own = slice(2 * e, 2 * e + 2)
        decoded = [jnp.asarray(exact[own], jnp.float32) for exact in (exact_up, exact_down)]
        expected, _, _ = mlp_gradients(
            x_deRD[d, e], decoded, {}, int32(sizes[d, e]), dy_RD, backend="reference", options=()
        )
        np.testing.assert_allclose(actual[d, e], expected, rtol=2e-5, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.covering(most=1)
@each_backend
@pytest.mark.parametrize("case", [CASES[0], CASES[9]], ids=str)
def test_packed_matrices_are_constants(case, backend):
    rhs_GNK, _ = pack(case, 0, G, F, D)
    gradient = jax.grad(
        lambda rhs: jnp.sum(grouped_matmul(normal(9, 7, D), rhs, int32([1, 2, 0, 1, 0, 3]), backend=backend)),
        allow_int=True,
    )(rhs_GNK)
    for array in jax.tree.leaves(gradient):
        assert array.dtype == jax.dtypes.float0 or not np.any(array.astype(np.float32))


@pytest.mark.covering(most=1)
@each_case
@pytest.mark.parametrize("R", [32, 160], ids=REGIMES)
def test_no_decoded_stack(case, R):
    """What a call or its gradient needs beside its arguments and result is less than two decoded matrices, of 32."""
    groups, N, K = 32, 192, 512
    rhs_GNK, _ = pack(case, 0, groups, N, K)
    args = normal(9, R, K), rhs_GNK, int32(np.zeros(groups))
    forward = compiled(grouped_matmul, "portable")
    backward = jax.jit(jax.grad(lambda *args: jnp.sum(forward(*args))))
    for function in (forward, backward):
        assert function.lower(*args).compile().memory_analysis().temp_size_in_bytes < 2 * N * K * 4


@pytest.mark.covering(most=1)
@one_case_a_format
@pytest.mark.parametrize("R", [32, 160], ids=REGIMES)
def test_no_decoded_stack_of_an_mlp(case, R):
    """Both matrices of one expert of 32, and not the double."""
    groups = 32
    stacks = pack(case, 0, groups, 2, F, D)[0], pack(case, 1, groups, D, F)[0]
    args = normal(9, R, D), *stacks, int32(np.zeros(groups))
    memory = compiled(expert_mlp, "portable").lower(*args).compile().memory_analysis()
    rows = R * D * 4
    assert memory.temp_size_in_bytes < 2 * 3 * F * D * 4 + rows


@pytest.mark.parametrize(
    "backend", [name for name, backend in {**BACKENDS, **GPU_BACKENDS}.items() if not backend.formats]
)
@pytest.mark.parametrize("format", FORMATS)
def test_backends_that_cannot_take_it_say_which_can(backend, format):
    stack, _ = pack(Case(format, (1, 32)), 0, 1, 2, 32)
    message = f"kernels '{backend}' do not take matrices packed as {format}: use 'portable'"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        grouped_matmul(jnp.ones((3, 32)), stack, int32([3]), backend=backend)
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        expert_mlp(
            jnp.ones((3, 32)),
            jnp.ones((1, 1, 32, 32)),
            pack(Case(format, (1, 32)), 0, 1, 32, 32)[0],
            int32([3]),
            backend=backend,
        )
