"""Every dispatch backend equals the dense oracle, for every routing, in one workspace."""

from functools import cache, partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.sharding import PartitionSpec as P

from jaxmoe.dispatch import DISPATCHES, DispatchLayout, choose_dispatch, get_dispatch
from jaxmoe.dispatch.all_to_all import capacity
from jaxmoe.dispatch.choose import RATES
from jaxmoe.kernels.grouped_matmul import expert_mlp
from jaxmoe.placement import ExpertPlacement
from tests.conftest import MESH_SHAPES, mesh_of
from tests.oracle import dense_moe

D, F, E, K, T = 16, 8, 11, 3, 40


def weights(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(E, 2, F, D)).astype(np.float32) / 4,
        rng.normal(size=(E, D, F)).astype(np.float32) / 4,
    )


def stack(placement: ExpertPlacement, w: np.ndarray) -> np.ndarray:
    """Experts into physical slots; NaN in padding slots, which nothing may read."""
    padded = np.concatenate([w, np.full_like(w[:1], np.nan)])
    return padded[placement.slot_to_expert]


@cache
def dispatched(name: str, mesh_shape: tuple[int, int, int], expert_axes: tuple[str, ...]):
    """A jitted layer body ``(x_TD, slots_TK, weights_TK) -> (y_TD, rounds)`` over the mesh, and its placement."""
    mesh, backend = mesh_of(*mesh_shape), get_dispatch(name)
    partial_axes = () if "tp" in expert_axes else ("tp",)
    n = int(np.prod([mesh.shape[axis] for axis in expert_axes]))
    placement = ExpertPlacement.round_robin(E, n)
    layout = DispatchLayout(
        mesh_shape=tuple(mesh.shape.items()),
        expert_axes=expert_axes,
        partial_axes=partial_axes,
        num_slots=placement.num_slots,
    )
    width_axis = "tp" if partial_axes else None
    tokens = P(backend.token_axes(layout))

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, P(expert_axes, None, width_axis), P(expert_axes, None, width_axis)),
        out_specs=(tokens, P()),
        check_vma=False,
    )
    def run(x_TD, slots_TK, weights_TK, w_gate_up, w_down):
        def apply_experts(rows, sizes, dtype):
            return expert_mlp(rows, w_gate_up, w_down, sizes, out_dtype=dtype)

        y_TD, stats = backend.run(x_TD, slots_TK, weights_TK, apply_experts, layout, False)
        return y_TD, stats.rounds

    w_gate_up, w_down = (stack(placement, w) for w in weights())
    shape = jax.ShapeDtypeStruct
    compiled = run.lower(
        shape((T, D), jnp.float32), shape((T, K), jnp.int32), shape((T, K), jnp.float32), w_gate_up, w_down
    ).compile()
    return lambda *args: compiled(*args, w_gate_up, w_down), placement, layout


def check(name: str, mesh_shape: tuple[int, int, int], expert_axes: tuple[str, ...], ids_TK: np.ndarray, seed: int = 1):
    run, placement, layout = dispatched(name, mesh_shape, expert_axes)
    rng = np.random.default_rng(seed)
    x_TD = rng.normal(size=(T, D)).astype(np.float32)
    weights_TK = rng.uniform(0.1, 1, size=(T, K)).astype(np.float32)
    slots_TK = np.where(ids_TK >= 0, placement.expert_to_slots[ids_TK, 0], -1).astype(np.int32)
    y_TD, rounds = run(x_TD, slots_TK, weights_TK)
    expected = dense_moe(x_TD, ids_TK, weights_TK, *weights())
    np.testing.assert_allclose(np.asarray(y_TD), expected, rtol=0, atol=2e-6 * max(1.0, np.abs(expected).max()))
    if name == "all_to_all":
        assert int(rounds) == expected_rounds(slots_TK, layout)
    else:
        assert int(rounds) == 0


def expected_rounds(slots_TK: np.ndarray, layout: DispatchLayout) -> int:
    """The largest need of any (source, destination) pair over C, counted on the host."""
    sources = layout.size(get_dispatch("all_to_all").token_axes(layout))
    n, p = layout.num_devices, layout.slots_per_device
    need = 0
    for slots in np.split(slots_TK, sources):
        needs = np.bincount(slots[slots >= 0] // p, minlength=n)
        need = max(need, needs.max())
    return -(-need // capacity(T // sources, K, n))


CASES = [
    (name, shape, axes)
    for name in DISPATCHES
    for shape in MESH_SHAPES
    for axes in [("ep",), ("ep", "tp")]
    if shape[1] > 1 or axes == ("ep",)
]


@pytest.mark.parametrize(("name", "mesh_shape", "expert_axes"), CASES)
def test_named_routings(name, mesh_shape, expert_axes):
    rng = np.random.default_rng(7)
    distinct = np.argsort(rng.random((T, E)), axis=1)[:, :K]
    one_device_idle = np.where(distinct % 8 == 3, 4, distinct)
    masked = np.where(np.arange(T)[:, None] % 3 == 0, -1, distinct)
    half_masked = distinct.copy()
    half_masked[T // 2 :] = -1
    routings = [
        distinct,
        np.zeros((T, K), int),
        np.full((T, K), E - 1),
        one_device_idle,
        masked,
        half_masked,
        np.full((T, K), -1),
    ]
    for ids_TK in routings:
        check(name, mesh_shape, expert_axes, ids_TK)


@pytest.mark.parametrize("name", list(DISPATCHES))
@pytest.mark.parametrize(("mesh_shape", "expert_axes"), [((2, 2, 2), ("ep",)), ((1, 2, 4), ("ep", "tp"))])
@settings(max_examples=60)
@given(data=st.data())
def test_any_routing(name, mesh_shape, expert_axes, data):
    bias = data.draw(st.lists(st.floats(0, 50), min_size=E, max_size=E))
    masked = data.draw(st.floats(0, 1))
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    ids_TK = np.argsort(-(rng.gumbel(size=(T, E)) + np.array(bias)), axis=1)[:, :K]
    ids_TK[rng.random(T) < masked] = -1
    check(name, mesh_shape, expert_axes, ids_TK, seed)


def test_all_to_one_needs_rounds_not_memory():
    run, placement, _ = dispatched("all_to_all", (1, 1, 8), ("ep",))
    even = placement.expert_to_slots[np.arange(T * K).reshape(T, K) % E, 0]
    skewed = np.full((T, K), placement.expert_to_slots[0, 0])
    x_TD, weights_TK = np.ones((T, D), np.float32), np.ones((T, K), np.float32)
    # One compiled program serves both, so its workspace is the same for both.
    _, few = run(x_TD, even.astype(np.int32), weights_TK)
    _, many = run(x_TD, skewed.astype(np.int32), weights_TK)
    assert int(few) == 1
    assert int(many) == -(-T * K // 8 // capacity(T // 8, K, 8)) > 1


@given(T=st.integers(1, 5000), K=st.integers(1, 16), n=st.integers(1, 64))
@example(T=1, K=1, n=64)
def test_capacity_covers_an_even_share(T, K, n):
    C = capacity(T, K, n)
    assert min(T * K, -(-T * K // n)) <= C <= T * K


def test_names():
    with pytest.raises(ValueError, match=r"dispatch backends are auto, replicated, all_to_all; got 'alltoall'"):
        get_dispatch("alltoall")


def layout_of(n: int) -> DispatchLayout:
    return DispatchLayout(
        mesh_shape=(("dp", 1), ("tp", 1), ("ep", n)), expert_axes=("ep",), partial_axes=("tp",), num_slots=64
    )


@pytest.mark.parametrize("platform", ["gpu", "cpu"])
def test_few_tokens_are_replicated_and_many_exchanged(platform):
    assert choose_dispatch(1, 8, 4096, 2, layout_of(8), platform).name == "replicated"
    assert choose_dispatch(16384, 2, 4096, 2, layout_of(8), platform).name == "all_to_all"
    # Nothing is exchanged where one device holds every expert.
    assert choose_dispatch(16384, 2, 4096, 2, layout_of(1), platform).name == "replicated"


def test_choice_is_the_least_modelled_time():
    for T in (1, 8, 64, 512, 4096):
        seconds = {name: RATES["gpu"].seconds(d.cost(T, 8, 2048, 2, layout_of(4))) for name, d in DISPATCHES.items()}
        assert choose_dispatch(T, 8, 2048, 2, layout_of(4), "gpu").name == min(seconds, key=seconds.get)
