"""The layer on meshes of the user's own: other names, more axes, several axes of a part, axes of type Explicit."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmoe
from jaxmoe.config import MLPConfig, MoEConfig
from jaxmoe.layers import swap_experts
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=3)

D = 16
CONFIG = MoEConfig(
    num_experts=6,
    num_experts_per_tok=2,
    hidden_size=D,
    moe_intermediate_size=8,
    bias=True,
    shared=MLPConfig(hidden_size=D, intermediate_size=8),
    shared_gate=True,
)
# Sizes and names of the axes, what plays which part, the (dp, tp, ep) that it comes to, and how x is laid out.
MESHES = {
    "the_default": ((2, 2, 2), ("dp", "tp", "ep"), None, P(("dp", "ep"))),
    "other_names": ((2, 2, 2), ("expert", "data", "model"), {"dp": "data", "tp": "model", "ep": "expert"}, P("data")),
    "two_axes": ((2, 4), ("data", "expert"), {"dp": "data", "ep": "expert"}, P("data", None)),
    "more_axes": (
        (2, 1, 2, 2),
        ("stage", "data", "fsdp", "expert"),
        {"dp": ("data", "fsdp"), "ep": "expert"},
        P("fsdp", "stage"),
    ),
    "experts_over_two": ((2, 2, 2), ("dp", "a", "b"), {"ep": ("a", "b")}, P()),
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}


def mesh_of_kind(name: str, kind: str) -> Mesh:
    sizes, names, *_ = MESHES[name]
    return jax.make_mesh(sizes, names, axis_types=(KINDS[kind],) * len(names))


@cache
def inputs():
    x, dy = np.random.default_rng(0).normal(size=(2, 8, 4, D)).astype(np.float32)
    return x, dy, np.random.default_rng(1).random((8, 4)) < 0.8


def loss_and_gradients(layer, x, dy, mask):
    def loss(layer, x):
        y, stats = layer(x, mask)
        return jnp.sum(y.astype(jnp.float32) * dy) + stats.load_balancing_loss, (y, stats.expert_counts)

    (_, (y, counts)), gradients = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)
    return y, counts, gradients


@cache
def expected():
    """On one device, with the same weights: they depend on the seed alone."""
    layer = on_one_device()
    y, counts, (of_layer, of_x) = nnx.jit(loss_and_gradients)(layer, *inputs())
    return np.asarray(y), np.asarray(counts), jax.device_get(nnx.to_pure_dict(of_layer)), np.asarray(of_x)


@cache
def on_one_device():
    return jaxmoe.MoE(CONFIG, mesh=mesh_of(1, 1, 1), rngs=nnx.Rngs(0))


def same_weights(layer):
    one = on_one_device()
    for name, param in vars(layer).items():
        if isinstance(param, nnx.Param) and name.split("_")[0] in ("w", "b") and "shared" not in name:
            value = np.asarray(getattr(one, name)[...])
            if name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
                value = np.where(
                    (layer.placement.slot_to_expert >= 0).reshape(-1, *[1] * (value.ndim - 1)),
                    value[layer.placement.slot_to_expert],
                    0,
                )
            param.set_value(jax.device_put(value, param[...].sharding))
    return layer


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MESHES)
def test_values_and_gradients(name, kind):
    mesh, (*_, axis_names, spec) = mesh_of_kind(name, kind), MESHES[name]
    layer = same_weights(jaxmoe.MoE(CONFIG, mesh=mesh, axis_names=axis_names, rngs=nnx.Rngs(0)))
    x, dy, mask = inputs()
    x = jax.device_put(x, NamedSharding(mesh, spec))
    if kind == "explicit":
        dy, mask = (jax.device_put(array, NamedSharding(mesh, spec)) for array in (dy, mask))
    y, counts, (of_layer, of_x) = nnx.jit(loss_and_gradients)(layer, x, dy, mask)
    wanted_y, wanted_counts, wanted, wanted_x = expected()
    np.testing.assert_allclose(y, wanted_y, atol=3e-6)
    np.testing.assert_array_equal(counts, wanted_counts)
    np.testing.assert_allclose(of_x, wanted_x, atol=2e-5)
    slots = layer.placement.expert_to_slots[:, 0]
    found = nnx.to_pure_dict(of_layer)
    for name in ("w_gate_up", "w_down", "b_down"):
        np.testing.assert_allclose(np.asarray(found[name])[slots], wanted[name], atol=2e-5, err_msg=name)
    np.testing.assert_allclose(found["w_router"], wanted["w_router"], atol=2e-5)
    np.testing.assert_allclose(found["shared"]["w_up"], wanted["shared"]["w_up"], atol=2e-5)
    # The gradient of a parameter lies as the parameter does, and with types in their arrays y lies as x does.
    assert found["w_down"].sharding.is_equivalent_to(layer.w_down[...].sharding, 3)
    if kind == "explicit":
        assert jax.typeof(y).sharding == jax.typeof(x).sharding


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_model_on_the_mesh_of_the_program(kind):
    """A dense layer in front with shardings of its own, under `jax.set_mesh`; the experts then move."""
    mesh = mesh_of_kind("other_names", kind)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Param(jnp.eye(D), out_sharding=P(None, None))
            self.moe = jaxmoe.MoE(CONFIG, mesh=mesh, axis_names=MESHES["other_names"][2], rngs=rngs)

        def __call__(self, x):
            h = x @ self.dense[...]
            return h + self.moe(h)[0]

    x = inputs()[0]
    plain = x + np.asarray(on_one_device()(x)[0])  # a layer on other devices is not made under `set_mesh`
    with jax.set_mesh(mesh):
        model = Model(nnx.Rngs(0))
        same_weights(model.moe)
        x_on_mesh = jax.device_put(x, NamedSharding(mesh, P("data")))
        y = nnx.jit(lambda model, x: model(x))(model, x_on_mesh)
        np.testing.assert_allclose(model(x_on_mesh), y, atol=1e-6)
    moved = swap_experts(model.moe, jaxmoe.ExpertPlacement.round_robin(6, 2))
    assert moved.total > 0
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(model(x_on_mesh), y, atol=3e-6)
    np.testing.assert_allclose(y, plain, atol=3e-6)


@pytest.mark.full
def test_given_experts_and_the_order_of_checkpoints():
    """What the router chose, given on a mesh of type Explicit, by another placement; its parameters in logical order."""
    mesh, (_, _, axis_names, spec) = mesh_of_kind("two_axes", "explicit"), MESHES["two_axes"]
    options = {"mesh": mesh, "axis_names": axis_names}
    layer = jaxmoe.MoE(CONFIG, **options, rngs=nnx.Rngs(0))
    x = jax.device_put(inputs()[0], NamedSharding(mesh, spec))
    y, stats = layer(x)
    other = jaxmoe.MoE(CONFIG, **options, placement="round_robin")
    jaxmoe.load_logical_state(other, jaxmoe.logical_state(layer))
    assert (other.placement.slot_to_expert != layer.placement.slot_to_expert).any()
    ids = np.asarray(stats.expert_ids).reshape(8, 4, 2)
    again, counted = other(x, expert_ids=ids[..., ::-1])
    np.testing.assert_allclose(again, y, atol=3e-6)
    np.testing.assert_array_equal(np.asarray(counted.expert_ids).reshape(ids.shape), ids[..., ::-1])
    on_mesh = jax.device_put(ids, NamedSharding(mesh, spec))
    np.testing.assert_allclose(
        nnx.jit(lambda layer, x, ids: layer(x, expert_ids=ids)[0])(other, x, on_mesh), y, atol=3e-6
    )


@pytest.mark.full
@pytest.mark.parametrize("dispatch", ["replicated", "all_gather", "all_to_all"])
@pytest.mark.parametrize("expert_axes", [("ep", "tp"), ("dp", "ep")])
def test_every_dispatch_over_two_parts(dispatch, expert_axes):
    config = dataclasses.replace(CONFIG, shared=None, shared_gate=False)
    mesh, names = mesh_of_kind("other_names", "explicit"), MESHES["other_names"][2]
    options = {"expert_axes": expert_axes, "dispatch": dispatch, "rngs": nnx.Rngs(0)}
    layer = jaxmoe.MoE(config, mesh=mesh, axis_names=names, **options)
    layer.choose_replicas("local_first")
    plain = jaxmoe.MoE(config, mesh=mesh_of(2, 2, 2), **options | {"rngs": nnx.Rngs(0)})
    x = inputs()[0]
    np.testing.assert_allclose(layer(x)[0], plain(x)[0], atol=3e-6)


def test_what_cannot_work_is_refused():
    mesh = mesh_of_kind("other_names", "explicit")
    with pytest.raises(ValueError, match=r"axes of the mesh are expert, data, model.*ep needs one.*axis_names"):
        jaxmoe.MoE(CONFIG, mesh=mesh)
    with pytest.raises(ValueError, match=r"'ep': \('experts',\).*say which with axis_names"):
        jaxmoe.MoE(CONFIG, mesh=mesh, axis_names={"ep": "experts"})
    with pytest.raises(ValueError, match=r"plays one part at most"):
        jaxmoe.MoE(CONFIG, mesh=mesh, axis_names={"ep": "expert", "tp": "expert"})
    with pytest.raises(ValueError, match=r"dp, tp and ep; got 'experts'"):
        jaxmoe.MoE(CONFIG, mesh=mesh, axis_names={"experts": "expert"})
    with pytest.raises(ValueError, match=r"axes dp, tp and ep, all of type Auto; got dp \(Explicit\).*make_mesh"):
        jaxmoe.load("demo", mesh=mesh_of_kind("the_default", "explicit"))
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(2, 2, 2), rngs=nnx.Rngs(0))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"make it on the mesh of the program"):
        layer(inputs()[0])
    inside = jax.shard_map(lambda x: layer(x)[0], mesh=layer.mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with pytest.raises(ValueError, match=r"outside of shard_map"):
        inside(inputs()[0])
