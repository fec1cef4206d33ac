"""Swapping experts between slots: what the layer computes stays, what is copied is what the plan says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe import ExpertPlacement, MoE, MoEConfig
from jaxmoe.layers import swap, swap_experts
from jaxmoe.layers.specs import param_specs
from jaxmoe.mesh import axes_size
from jaxmoe.placement.migration import migration_bytes
from tests.support.layers import SLOTS, D, E, F, make_layer
from tests.support.meshes import mesh_of
from tests.support.runs import examples

pytestmark = pytest.mark.covering(most=2)

CASES = [((1, 2, 4), ("ep",)), ((2, 2, 2), ("ep",)), ((2, 2, 2), ("ep", "tp")), ((1, 1, 8), ("ep",))]
IDS = [f"{shape}-{'-'.join(axes)}" for shape, axes in CASES]


@st.composite
def placements(draw, ep: int) -> ExpertPlacement:
    extra = draw(st.lists(st.integers(-1, E - 1), min_size=SLOTS - E, max_size=SLOTS - E))
    return ExpertPlacement(E, ep, draw(st.permutations([*range(E), *extra])))


def tokens(dtype=jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (13, D)).astype(dtype)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("shape", "axes"), CASES, ids=IDS)
@given(data=st.data())
@settings(max_examples=examples(5, 15))
def test_any_pair_of_placements(shape, axes, data) -> None:
    ep = axes_size(mesh_of(*shape), axes)
    before, after = data.draw(placements(ep)), data.draw(placements(ep))
    num_nodes = data.draw(st.sampled_from([1, 2]))
    layer = make_layer(shape, axes, before)
    y_before, _ = layer(tokens())
    shardings = [stack.get_value().sharding for stack in layer.expert_stacks()]

    moved = swap_experts(layer, after, num_nodes=num_nodes)

    y_after, _ = layer(tokens())
    np.testing.assert_allclose(y_after, y_before, atol=1e-5)
    assert layer.placement == after
    assert [stack.get_value().sharding for stack in layer.expert_stacks()] == shardings
    specs = {spec.path: spec for spec in param_specs(layer)}
    assert specs["w_down"].rows == tuple(after.slot_to_expert.tolist())
    expert_bytes = 3 * D * F * 4
    copies_of_the_experts = layer.mesh.size // ep // (1 if "tp" in axes else layer.mesh.shape["tp"])
    wanted = migration_bytes([before], [after], expert_bytes * copies_of_the_experts, num_nodes=num_nodes)
    assert vars(moved) == wanted


@pytest.mark.full
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_biases_go_along(dtype) -> None:
    rng = np.random.default_rng(0)
    before = ExpertPlacement(E, 4, [*range(E), *[-1] * (SLOTS - E)])
    layer = make_layer((1, 2, 4), ("ep",), before, dtype=dtype, bias=True)
    y_before, _ = layer(tokens(dtype))
    for _ in range(3):
        swap_experts(layer, ExpertPlacement(E, 4, rng.permutation([*range(E), *rng.integers(0, E, SLOTS - E)])))
        y_after, _ = layer(tokens(dtype))
        np.testing.assert_allclose(y_after.astype(jnp.float32), y_before.astype(jnp.float32), atol=2e-2)


def test_one_expert_sent_to_everybody() -> None:
    """The sender sends more slots than any device receives or holds."""
    before = ExpertPlacement(8, 8, np.arange(16) % 8)
    after = ExpertPlacement(8, 8, [0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7, 0, 1])
    config = MoEConfig(num_experts=8, num_experts_per_tok=2, hidden_size=D, moe_intermediate_size=F)
    layer = MoE(config, mesh=mesh_of(1, 1, 8), placement=before, rngs=nnx.Rngs(0))
    experts = {name: np.asarray(getattr(layer, name)[...]) for name in ("w_gate_up", "w_down")}
    swap_experts(layer, after)
    for name, old in experts.items():
        new = np.asarray(getattr(layer, name)[...])
        for slot, expert in enumerate(after.slot_to_expert):
            assert any(np.array_equal(new[slot], old[source]) for source in before.expert_to_slots[expert])


def test_nothing_to_move_moves_nothing() -> None:
    before = ExpertPlacement.round_robin(E, 8, num_slots=SLOTS)
    layer = make_layer((1, 1, 8), ("ep",), before)
    arrays = [stack.get_value() for stack in layer.expert_stacks()]
    assert swap_experts(layer, before).total == 0
    assert all(stack.get_value() is array for stack, array in zip(layer.expert_stacks(), arrays, strict=True))


def test_misfits_are_refused_before_anything_moves() -> None:
    layer = make_layer((1, 1, 8), ("ep",), ExpertPlacement.linear(E, 8))
    with pytest.raises(ValueError, match=r"keeps its 16 slots for 11 experts on 8 devices; .* 24 slots.*num_slots=16"):
        swap_experts(layer, ExpertPlacement.linear(E, 8, num_slots=24))
    with pytest.raises(ValueError, match="4 devices"):
        swap_experts(layer, ExpertPlacement.linear(E, 4, num_slots=SLOTS))
    assert layer.placement == ExpertPlacement.linear(E, 8)


@pytest.mark.full
@pytest.mark.parametrize("calls", [0, 1, 2, 5, 8])
def test_a_swap_that_fails_leaves_the_layer_as_it_was(monkeypatch, calls) -> None:
    before = ExpertPlacement(E, 4, [*range(E), 0, 1, 2, -1, -1])
    layer = make_layer((1, 2, 4), ("ep",), before, bias=True)
    y_before, _ = layer(tokens())
    take, left = swap._take, calls

    def failing_take(*args, **kwargs):
        nonlocal left
        left -= 1
        if left < 0:
            monkeypatch.setattr(swap, "_take", take)
            raise MemoryError("no room")
        return take(*args, **kwargs)

    monkeypatch.setattr(swap, "_take", failing_take)
    with pytest.raises(MemoryError, match="no room"):
        swap_experts(layer, ExpertPlacement(E, 4, np.roll(before.slot_to_expert, 3)))
    assert layer.placement == before
    np.testing.assert_allclose(layer(tokens())[0], y_before, atol=1e-5)


@pytest.mark.full
def test_ctrl_c_waits_for_the_layer(monkeypatch) -> None:
    class Interrupted(swap.ThreadPoolExecutor):
        def submit(self, *args):
            super().submit(*args)
            raise KeyboardInterrupt  # as in the main thread, while the other one works

    before, after = ExpertPlacement.linear(E, 8, num_slots=SLOTS), ExpertPlacement.round_robin(E, 8, num_slots=SLOTS)
    layer = make_layer((1, 1, 8), ("ep",), before)
    y_before, _ = layer(tokens())
    monkeypatch.setattr(swap, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        swap_experts(layer, after)
    assert layer.placement == after
    np.testing.assert_allclose(layer(tokens())[0], y_before, atol=1e-5)


def test_memory_of_a_swap(monkeypatch) -> None:
    """Besides the stacks a device holds the slots it receives of one stack, and one more."""
    most = 0

    def watched_put(*args, **kwargs):
        nonlocal most
        stack = args[0]
        per_slot = stack.nbytes // SLOTS
        pieces = sum(
            array.nbytes
            for array in jax.live_arrays()
            if array.ndim == stack.ndim and array.shape[0] == 1 and len(array.devices()) == 1
        )
        most = max(most, pieces / (8 * per_slot))
        return put(*args, **kwargs)

    put = swap._put
    monkeypatch.setattr(swap, "_put", watched_put)
    before = ExpertPlacement.linear(E, 8)
    layer = make_layer((1, 1, 8), ("ep",), before)
    swap_experts(layer, ExpertPlacement(E, 8, np.roll(before.slot_to_expert, 5)))
    assert 0 < most <= SLOTS // 8 + 1
