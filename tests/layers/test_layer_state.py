"""Layers go through what Flax users do with modules: each computes what its weights say, or refuses in one line."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe import ExpertPlacement, MoE, MoEConfig, load_logical_state, logical_state
from jaxmoe.layers import swap_experts
from jaxmoe.layers.routed_experts import routed_experts
from tests.support.meshes import mesh_of
from tests.support.oracle import dense_moe, softmax_top_k
from tests.support.runs import examples

E, K, D, F, EP, SLOTS = 5, 2, 8, 4, 4, 8
CONFIG = MoEConfig(num_experts=E, num_experts_per_tok=K, hidden_size=D, moe_intermediate_size=F)
X = np.random.default_rng(0).normal(size=(12, D)).astype(np.float32)
LINEAR = ExpertPlacement.linear(E, EP, num_slots=SLOTS)
PADDED = ExpertPlacement(E, EP, [4, -1, 3, -1, 2, -1, 1, 0])
REPLICAS = ExpertPlacement(E, EP, [0, 3, 1, 0, 2, 4, 0, 1])
PLACEMENTS = [LINEAR, PADDED, REPLICAS]


def make(placement=LINEAR, *, seed=0, **options) -> MoE:
    return MoE(CONFIG, mesh=mesh_of(1, 1, EP), placement=placement, rngs=nnx.Rngs(seed), **options)


def dense(layer: MoE) -> np.ndarray:
    """What a new layer's weights say, by the dense oracle."""
    slots = layer.placement.expert_to_slots[:, 0]
    ids_TK, weights_TK = softmax_top_k(X, np.asarray(layer.w_router[...]), K)
    return dense_moe(
        X, ids_TK, weights_TK, np.asarray(layer.w_gate_up[...])[slots], np.asarray(layer.w_down[...])[slots]
    )


TRACED = []


@nnx.jit
def jitted(layer: MoE, x: jax.Array) -> jax.Array:
    """One function for all layers, as for a teacher and a student."""
    TRACED.append(layer.replica_choice)
    return layer(x)[0]


@nnx.jit
def scaled(layer: MoE) -> None:
    """A step that does not call the layer, as an optimizer's."""
    layer.w_down.set_value(layer.w_down[...] * 1)


def jitted_passed_through(layer: MoE) -> MoE:
    scaled(layer)
    return layer


def check(layer: MoE, want: np.ndarray) -> None:
    np.testing.assert_allclose(layer(X)[0], want, atol=3e-6)


def split_and_merge(layer: MoE) -> MoE:
    """Another module with the same variables."""
    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, state)


COPIES = {
    "merge of a copy": lambda layer: split_and_merge(nnx.clone(layer)),
    "clone": nnx.clone,
    "clone of arrays": lambda layer: nnx.clone(layer, arrays=True),
    "deepcopy": copy.deepcopy,
}
CHOICES = {"modulo": {}, "local_first": {"devices_per_node": 2}, "least_loaded": {"last_load": np.arange(EP)}}


@given(data=st.data())
@settings(max_examples=examples(4, 25))
def test_any_sequence_leaves_every_layer_as_the_oracle_says(data) -> None:
    layers = [make(LINEAR, seed=0, dispatch="all_to_all"), make(REPLICAS, seed=1, dispatch="all_to_all")]
    wants, variables = [dense(layer) for layer in layers], [0, 1]  # of each layer the number of its set of variables
    for _ in range(data.draw(st.integers(1, 7))):
        i, j = (data.draw(st.integers(0, len(layers) - 1)) for _ in range(2))
        match data.draw(
            st.sampled_from(["copy", "share", "swap", "swap", "jit", "update", "params", "logical", "choose"])
        ):
            case "copy":
                layers.append(COPIES[data.draw(st.sampled_from(sorted(COPIES)))](layers[i]))
                variables.append(len(wants))
                wants.append(wants[variables[i]])
            case "share":
                layers.append(split_and_merge(layers[i]))
                variables.append(variables[i])
            case "swap":
                swap_experts(layers[i], data.draw(st.sampled_from(PLACEMENTS)))
            case "jit":
                for k in (i, j):
                    np.testing.assert_allclose(jitted(layers[k], X), wants[variables[k]], atol=3e-6)
            case "update":
                nnx.update(layers[i], jax.tree.map(jnp.copy, nnx.state(layers[j])))
                wants[variables[i]] = wants[variables[j]]
            case "params":
                nnx.update(layers[i], jax.tree.map(jnp.copy, nnx.state(layers[j], nnx.Param)))
                if layers[i].placement != layers[j].placement:
                    for use in (layers[i], jitted_passed_through(layers[i]), nnx.clone(layers[i])):
                        with pytest.raises(ValueError, match="give the layer a whole state"):
                            use(X)
                    nnx.update(layers[i], nnx.state(layers[j]))
                wants[variables[i]] = wants[variables[j]]
            case "logical":
                load_logical_state(layers[i], logical_state(layers[j]))
                wants[variables[i]] = wants[variables[j]]
            case "choose":
                choice = data.draw(st.sampled_from(sorted(CHOICES)))
                layers[i].choose_replicas(choice, **CHOICES[choice])
        for layer, number in zip(layers, variables, strict=True):
            check(layer, wants[number])


def test_one_jit_of_two_layers_keeps_their_placements() -> None:
    first, second = make(LINEAR), make(REPLICAS, seed=1)
    want = dense(second)
    for layer in (first, second):
        jitted(layer, X)
    assert (first.placement, second.placement) == (LINEAR, REPLICAS)
    swap_experts(second, LINEAR)
    check(second, want)


def test_a_rebalance_compiles_nothing_again() -> None:
    layer = make(LINEAR)
    want = dense(layer)
    jitted(layer, X)
    check(layer, want)
    traced, compiled = len(TRACED), routed_experts._cache_size()
    for placement in (REPLICAS, PADDED, LINEAR):
        swap_experts(layer, placement)
        np.testing.assert_allclose(jitted(layer, X), want, atol=3e-6)
        check(layer, want)
    assert (len(TRACED), routed_experts._cache_size()) == (traced, compiled)


@pytest.mark.full
def test_a_replica_choice_is_part_of_the_program_and_its_loads_of_the_state() -> None:
    layer = make(REPLICAS)
    layer.choose_replicas("least_loaded", last_load=[9, 1, 5, 3])
    loaded = np.asarray(layer.expert_to_slots[...])
    swap_experts(layer, LINEAR)
    swap_experts(layer, REPLICAS)
    np.testing.assert_array_equal(layer.expert_to_slots[...], loaded)
    other = make(REPLICAS)
    other.choose_replicas("least_loaded", last_load=[1, 9, 1, 1])
    nnx.update(other, nnx.state(layer))
    np.testing.assert_array_equal(other.last_load[...], [9, 1, 5, 3])
    traced = len(TRACED)
    jitted(layer, X)
    layer.choose_replicas("random")
    jitted(layer, X)
    assert TRACED[traced:] == ["least_loaded", "random"]


def test_tables_for_the_nearest_replica_give_way_to_a_placement_that_came_without_them() -> None:
    layer, other = make(REPLICAS, dispatch="all_to_all"), make(PADDED, seed=1, dispatch="all_to_all")
    layer.choose_replicas("local_first")
    nnx.update(layer, nnx.state(other))
    check(layer, dense(other))


def test_shared_arrays_outlive_a_swap_of_either_layer() -> None:
    layer = make(LINEAR)
    want, other = dense(layer), nnx.clone(layer)
    held = [stack.get_value() for stack in other.expert_stacks()]
    swap_experts(layer, REPLICAS)
    assert not any(array.is_deleted() for array in held)
    for each in (layer, other):
        check(each, want)
    swap_experts(other, PADDED)
    for each in (layer, other):
        check(each, want)


def test_shared_variables_are_swapped_for_both() -> None:
    layer = make(LINEAR)
    want, other = dense(layer), nnx.clone(layer, variables=False)
    swap_experts(layer, REPLICAS)
    assert other.placement == REPLICAS
    check(other, want)


def test_parameters_alone_are_refused_where_they_show_another_placement() -> None:
    layer, wider = make(LINEAR), make(ExpertPlacement.linear(E, EP, num_slots=12), seed=1)
    nnx.update(layer, nnx.state(wider, nnx.Param))
    with pytest.raises(ValueError, match=r"w_down was filled by another one \(12 slots, .* not nnx.Param alone"):
        layer(X)
    nnx.update(layer, nnx.state(wider))
    assert layer.placement == wider.placement
    check(layer, dense(wider))
    for stack in layer.expert_stacks():  # raw arrays, as a checkpoint library without Flax's Variables gives them
        stack.set_value(jnp.concatenate([stack[...], stack[...]]))
    with pytest.raises(ValueError, match=r"they have 24 slots and the placement 12; .* not nnx.Param alone"):
        layer(X)


def test_parameters_alone_of_another_placement_are_refused_by_all_that_uses_them() -> None:
    layer, other = make(LINEAR), make(REPLICAS, seed=1)
    nnx.update(layer, jax.tree.map(jnp.copy, nnx.state(other, nnx.Param)))
    for use in (lambda: layer(X), lambda: swap_experts(layer, PADDED), lambda: logical_state(layer)):
        with pytest.raises(
            ValueError, match=r"filled by another one \(8 slots, slot 1 holds expert 3; the layer has 8"
        ):
            use()
    load_logical_state(layer, logical_state(other))
    check(layer, dense(other))
    nnx.update(layer, nnx.state(make(LINEAR, seed=2), nnx.Param))
    check(layer, dense(make(LINEAR, seed=2)))


def test_a_step_of_another_layer_brings_no_placement_along() -> None:
    first, second = make(LINEAR), make(REPLICAS, seed=1)
    times_one = jax.jit(lambda state: jax.tree.map(lambda value: value * 1, state))
    for layer in (first, second):
        scaled(layer)
        check(layer, dense(layer))
        nnx.update(layer, times_one(nnx.state(layer, nnx.Param)))
        check(layer, dense(layer))
    nnx.update(first, nnx.state(second, nnx.Param))
    with pytest.raises(ValueError, match="filled by another one"):
        first(X)


def test_donated_arrays_are_named() -> None:
    layer = make(LINEAR)
    graphdef, state = nnx.split(layer)
    state = jax.jit(lambda state: jax.tree.map(lambda x: x + 0, state), donate_argnums=0)(state)
    for use in (lambda: layer(X), lambda: swap_experts(layer, REPLICAS), lambda: logical_state(layer)):
        with pytest.raises(RuntimeError, match=r"the arrays of this MoE are gone: \w+ was donated .*; put the result"):
            use()
    nnx.update(layer, state)
    check(layer, dense(layer))


def test_a_placement_is_read_where_it_has_values() -> None:
    with pytest.raises(ValueError, match=r"its tables are traced; read layer.placement outside of it"):
        nnx.jit(lambda layer: jnp.ones(layer.placement.num_slots))(make(LINEAR))
    abstract = nnx.eval_shape(lambda: make(LINEAR))
    with pytest.raises(ValueError, match=r"those of this layer are abstract"):
        abstract.placement  # noqa: B018
    with pytest.raises(RuntimeError, match=r"this MoE has no weights: \w+ is a shape without a value"):
        abstract(X)
