"""A layer under the transformations of Flax and JAX: the values of the plain call, and a process that works on."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe import ExpertPlacement, MoE, MoEConfig
from tests.support.meshes import mesh_of

MESH_SHAPE, D = (1, 2, 2), 8
CONFIG = MoEConfig(num_experts=3, num_experts_per_tok=2, hidden_size=D, moe_intermediate_size=4)
PLACEMENT = ExpertPlacement(3, 2, [2, 0, 1, -1])
X = np.random.default_rng(0).normal(size=(6, D)).astype(np.float32)


def make(rngs: nnx.Rngs) -> MoE:
    return MoE(CONFIG, mesh=mesh_of(*MESH_SHAPE), placement=PLACEMENT, dispatch="replicated", rngs=rngs)


@pytest.fixture(scope="module")
def layer() -> MoE:
    return make(nnx.Rngs(0))


@pytest.fixture(scope="module")
def stacked() -> MoE:
    """Three layers in one module."""
    return nnx.split_rngs(splits=3)(nnx.vmap(make))(nnx.Rngs(0))


def one_of(stacked: MoE, index: int) -> MoE:
    graphdef, state = nnx.split(stacked)
    return nnx.merge(graphdef, jax.tree.map(lambda value: value[index], state))


def loss(layer: MoE, x: jax.Array) -> jax.Array:
    return jnp.sum(layer(x)[0] ** 2)


@pytest.mark.full
def test_tabulate_and_display(layer, capsys) -> None:
    table = nnx.tabulate(layer, X, console_kwargs={"width": 200})
    assert "w_gate_up" in table
    assert "[4,2,4,8]" in table
    nnx.display(layer)
    assert "slot_to_expert" in capsys.readouterr().out
    # Flax replaces methods of the class for the time of the table.
    np.testing.assert_allclose(make(nnx.Rngs(0))(X)[0], layer(X)[0])


def test_eval_shape_knows_shapes_and_types(layer) -> None:
    abstract = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    shapes = {path: (value.shape, value.dtype) for path, value in nnx.to_flat_state(nnx.state(abstract))}
    assert shapes == {path: (value.shape, value.dtype) for path, value in nnx.to_flat_state(nnx.state(layer))}
    y, _ = nnx.eval_shape(lambda: make(nnx.Rngs(0))(X))
    assert (y.shape, y.dtype) == (X.shape, jnp.float32)
    nnx.update(abstract, nnx.state(layer))
    assert abstract.placement == PLACEMENT
    np.testing.assert_allclose(abstract(X)[0], layer(X)[0])


@pytest.mark.full
def test_gradients_under_jit_remat_and_checkpoint_are_those_of_the_plain_call(layer) -> None:
    plain = nnx.grad(loss)(layer, X)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.checkpoint
    def checkpointed(params):
        return loss(nnx.merge(graphdef, params, rest), X)

    for gradients in (
        nnx.jit(nnx.grad(loss))(layer, X),
        nnx.grad(nnx.remat(loss))(layer, X),
        jax.jit(jax.grad(checkpointed))(params),
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, plain)


@pytest.mark.full
def test_layers_stacked_by_vmap_and_run_by_vmap_and_scan(stacked) -> None:
    layers = [one_of(stacked, index) for index in range(3)]
    assert [each.placement for each in layers] == [PLACEMENT] * 3
    assert not np.array_equal(layers[0].w_down[...], layers[1].w_down[...])
    together = nnx.vmap(lambda layer, x: layer(x)[0], in_axes=(0, None))(stacked, X)
    np.testing.assert_allclose(together, [each(X)[0] for each in layers], atol=1e-5)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def through(x, layer):
        return layer(x)[0]

    x = jnp.asarray(X)
    for each in layers:
        x = each(x)[0]
    np.testing.assert_allclose(through(jnp.asarray(X), stacked), x, atol=1e-5)
    with pytest.raises(ValueError, match=r"got shape \(3, 4\), that of layers stacked by nnx.vmap"):
        stacked.placement  # noqa: B018


@pytest.mark.full
def test_an_exported_program_takes_another_placement_with_the_state(layer) -> None:
    graphdef, state = nnx.split(layer)
    leaves, treedef = jax.tree.flatten(state)
    apply = jax.jit(lambda leaves, x: nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))(x)[0])
    exported = jax.export.export(apply)(leaves, X)
    other = MoE(CONFIG, mesh=layer.mesh, placement=ExpertPlacement(3, 2, [1, 1, 0, 2]), rngs=nnx.Rngs(1))
    for each in (layer, other):
        got = jax.jit(exported.call)(jax.tree.leaves(nnx.state(each)), jax.device_put(X, each.slot_to_expert.sharding))
        np.testing.assert_allclose(got, each(X)[0], atol=1e-5)


def test_pickle_stops_at_the_devices_of_the_mesh(layer) -> None:
    with pytest.raises(TypeError, match="cannot pickle .*Device"):
        pickle.dumps(layer)
