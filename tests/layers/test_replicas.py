"""Replica choice in a running layer: the same result whatever is chosen, and the slots that the tables say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe import ExpertPlacement
from jaxmoe.layers.replicas import ReplicaRule, choose_slots, token_draws, token_turns
from jaxmoe.placement.replicas import REPLICA_CHOICES, ReplicaContext
from tests.support.layers import D, E, make_layer
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=3)

# Expert 0 is on every device, the others once or twice.
PLACEMENT = ExpertPlacement(E, 4, [0, 1, 2, 3, 4, 0, 5, 6, 1, 2, 0, 7, 8, 9, 10, 0])
LOADS = np.array([9.0, 1.0, 5.0, 3.0])
RULES = {
    "modulo": {},
    "random": {},
    "local_first": {"devices_per_node": 2},
    "least_loaded": {"last_load": LOADS},
}


def test_random_weights_are_alike_in_replicas_and_nothing_is_in_padding() -> None:
    placement = ExpertPlacement(3, 4, [0, 1, 2, -1, 1, 0, -1, 1])
    config = jaxmoe.MoEConfig(num_experts=3, num_experts_per_tok=2, hidden_size=D, moe_intermediate_size=8, bias=True)
    layer = jaxmoe.MoE(config, mesh=mesh_of(1, 2, 4), placement=placement, rngs=nnx.Rngs(0))
    for stack in (layer.w_gate_up, layer.w_down):
        values = np.asarray(stack[...])
        assert stack[...].addressable_shards[0].data.shape[0] == 2, "two slots on a device"
        assert not values[placement.slot_to_expert < 0].any()
        experts = values[placement.expert_to_slots[:, 0]]
        assert len(np.unique(experts.reshape(3, -1)[:, 0])) == 3
        assert 0.5 < experts.std() * np.sqrt(experts.shape[-1]) < 2
        held = placement.slot_to_expert >= 0
        np.testing.assert_array_equal(values[held], experts[placement.slot_to_expert[held]])


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
@pytest.mark.parametrize("choice", RULES)
def test_the_result_does_not_depend_on_the_choice(choice, dispatch) -> None:
    layer = make_layer((1, 2, 4), ("ep",), PLACEMENT)
    layer.dispatch = dispatch
    x = jax.random.normal(jax.random.key(0), (37, D))
    expected, _ = layer(x)
    layer.choose_replicas(choice, **RULES[choice])
    y, _ = layer(x)
    np.testing.assert_allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("choice", [name for name in RULES if name != "random"])
def test_slots_are_those_of_the_evaluation(choice) -> None:
    """What `jaxmoe.placement` judges is what the program does."""
    ids = np.random.default_rng(0).integers(0, E, (24, 3))
    rule = ReplicaRule(choice=choice, **RULES[choice])
    slots_nER, counts_nE = rule.tables(PLACEMENT)
    for device in range(4):
        context = ReplicaContext(
            home=np.full(24, device), turn=np.arange(24), devices_per_node=2, last_load=LOADS, seed=0
        )
        wanted = REPLICA_CHOICES[choice](ids, PLACEMENT, context)
        slots = choose_slots(
            jnp.asarray(ids),
            jnp.asarray(slots_nER[device]),
            jnp.asarray(counts_nE[device]),
            token_turns((24, 3), device),
        )
        np.testing.assert_array_equal(slots, wanted)


def test_draws_are_even_repeatable_and_bound_to_the_token() -> None:
    x = jax.random.normal(jax.random.key(3), (4000, 16))
    draws = token_draws(x, 2)
    assert int(draws.min()) >= 0
    for replicas in (2, 3, 5):
        shares = np.bincount(np.asarray(draws % replicas).reshape(-1), minlength=replicas) / draws.size
        np.testing.assert_allclose(shares, 1 / replicas, atol=0.02)
    np.testing.assert_array_equal(token_draws(x[::-1], 2), draws[::-1])
    assert not np.array_equal(token_draws(x[:, ::-1], 2), draws)


def test_new_loads_compile_nothing() -> None:
    from jaxmoe.layers.routed_experts import routed_experts

    layer = make_layer((1, 1, 4), ("ep",), PLACEMENT)
    x = jnp.ones((8, D))
    layer.choose_replicas("least_loaded", last_load=LOADS)
    layer(x)
    compiled = routed_experts._cache_size()
    layer.choose_replicas("least_loaded", last_load=LOADS[::-1])
    layer(x)
    assert routed_experts._cache_size() == compiled


def test_the_choice_stays_through_a_new_placement() -> None:
    layer = make_layer((1, 1, 4), ("ep",), PLACEMENT)
    layer.choose_replicas("local_first")
    after = ExpertPlacement(E, 4, np.roll(PLACEMENT.slot_to_expert, 3))
    layer.set_placement(after)
    slots, counts = ReplicaRule(choice="local_first").tables(after)
    np.testing.assert_array_equal(layer.near_slots[...], slots)
    np.testing.assert_array_equal(layer.near_counts[...], counts)


def test_misfits() -> None:
    layer = make_layer((1, 1, 4), ("ep",), PLACEMENT)
    with pytest.raises(ValueError, match=r"follows the loads of 4 devices in the last window; got none"):
        layer.choose_replicas("least_loaded")
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        layer.choose_replicas("least_loaded", last_load=np.ones(3))
    with pytest.raises(ValueError, match="no multiple of devices_per_node=3"):
        layer.choose_replicas("local_first", devices_per_node=3)
    for none in (0, -1):
        with pytest.raises(ValueError, match=f"devices_per_node is an integer of at least 1; got {none}"):
            layer.choose_replicas("local_first", devices_per_node=none)
    with pytest.raises(ValueError, match="replica choices are least_loaded"):
        layer.choose_replicas("nearest")
    assert layer.replica_choice == "modulo"
