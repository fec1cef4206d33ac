"""Parameters in logical order: saved with Orbax on one mesh and placement, restored on another."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jaxmoe
from jaxmoe import ExpertPlacement, MoE, MoEConfig
from jaxmoe.layers import ParamFactory, VocabTable, logical
from tests.support.meshes import mesh_of

EVEN = MoEConfig(num_experts=8, num_experts_per_tok=2, hidden_size=16, moe_intermediate_size=4)
UNEVEN = MoEConfig(num_experts=5, num_experts_per_tok=2, hidden_size=16, moe_intermediate_size=4, bias=True)
X = np.random.default_rng(0).normal(size=(12, 16)).astype(np.float32)


class Net(nnx.Module):
    """Somebody's own model: two MoE layers in a list, a table whose vocabulary is padded for tp, and a parameter."""

    def __init__(self, shape, axes, placements, *, seed=None, dtype=jnp.float32):
        mesh, rngs = mesh_of(*shape), None if seed is None else nnx.Rngs(seed)
        self.layers = nnx.List(
            MoE(config, mesh=mesh, placement=placement, expert_axes=axes, dtype=dtype, rngs=rngs)
            for config, placement in zip((EVEN, UNEVEN), placements, strict=True)
        )
        self.table = VocabTable(5, 16, param=ParamFactory(mesh, dtype, rngs))
        self.scale = nnx.Param(jnp.full((16,), 0.0 if seed is None else 2.0, dtype))

    def __call__(self, x):
        for layer in self.layers:
            x = x + layer(x)[0]
        return self.table.logits((x * self.scale[...])[:, None], ())[:, 0, :5]


HOMES = {
    "padding": ((1, 2, 4), ("ep",), ["linear", ExpertPlacement(5, 4, [4, -1, 3, -1, 2, -1, 1, 0])]),
    "replicas": (
        (2, 2, 2),
        ("ep",),
        [ExpertPlacement(8, 2, [*range(8), 3, 3]), ExpertPlacement(5, 2, [0, 3, 1, 0, 2, 4])],
    ),
    "over tp": ((2, 2, 2), ("ep", "tp"), ["round_robin", "round_robin"]),
    "one device": ((1, 1, 1), ("ep",), ["linear", "linear"]),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves the same weights from a home, each home once; gives the directory and the output."""
    root, state = tmp_path_factory.mktemp("orbax"), jaxmoe.logical_state(Net(*HOMES["padding"], seed=0))

    @cache
    def save(name):
        net = Net(*HOMES[name], seed=0)
        jaxmoe.load_logical_state(net, state)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(root / name, jaxmoe.logical_state(net))
        return root / name, np.asarray(net(X))

    return save


@pytest.mark.full
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("padding", "replicas"),
        ("replicas", "over tp"),
        ("over tp", "padding"),
        ("padding", "one device"),
        ("one device", "replicas"),
    ],
)
def test_saved_in_one_home_and_restored_in_another(saved, before, after) -> None:
    directory, want = saved(before)
    net = Net(*HOMES[after])
    with ocp.StandardCheckpointer() as checkpointer:
        jaxmoe.load_logical_state(net, checkpointer.restore(directory, jaxmoe.abstract_logical_state(net)))
    np.testing.assert_allclose(net(X), want, atol=1e-5)
    for layer in net.layers:
        placement = layer.placement
        for stack in layer.expert_stacks():
            values = np.asarray(stack[...])
            held = placement.slot_to_expert >= 0
            first = placement.expert_to_slots[placement.slot_to_expert[held], 0]
            np.testing.assert_array_equal(values[held], values[first])
            assert not values[~held].any()


def test_a_state_is_the_experts_in_order_on_their_share_of_the_devices() -> None:
    net = Net(*HOMES["padding"], seed=0, dtype=jnp.bfloat16)
    state, specs = jaxmoe.logical_state(net), jaxmoe.abstract_logical_state(net)
    assert state.keys() == specs.keys()
    for path, array in state.items():
        spec = specs[path]
        assert (array.shape, array.dtype) == (spec.shape, spec.dtype)
        assert array.sharding.is_equivalent_to(spec.sharding, array.ndim)
    layer, slots = net.layers[1], [7, 6, 4, 2, 0]
    for name in ("w_gate_up", "w_down", "b_gate_up", "b_down"):
        np.testing.assert_array_equal(state[f"layers.1.{name}"], np.asarray(getattr(layer, name)[...])[slots])
    assert state["layers.0.w_gate_up"] is net.layers[0].w_gate_up.get_value()
    # Five experts do not divide over four devices, sixteen columns do.
    assert specs["layers.1.w_gate_up"].sharding.spec == P(None, None, "tp", "ep")
    assert state["table.weight"].shape == (5, 16)
    for name in ("w_gate_up", "w_down"):
        array = state[f"layers.1.{name}"]
        assert {shard.data.nbytes for shard in array.addressable_shards} == {array.nbytes // 8}


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("config", "part"), [(EVEN, "8,2,4,16"), (UNEVEN, "5,2,4,16")])
def test_no_device_holds_a_whole_stack_on_the_way(config, part) -> None:
    placement = ExpertPlacement(
        config.num_experts, 4, [*reversed(range(config.num_experts)), *[0] * (12 - config.num_experts)]
    )
    layer = MoE(config, mesh=mesh_of(1, 1, 4), placement=placement, rngs=nnx.Rngs(0))
    stack = layer.w_gate_up[...]
    order = logical._Slots(placement, stack.sharding, layer.expert_axes)
    over = order._over(order.shape(stack.shape))
    there = logical._to_logical.lower(stack, jnp.arange(config.num_experts), over=over).compile().as_text()
    back = logical._to_physical.lower(order.to_logical(stack), jnp.arange(12), over=over).compile().as_text()
    for text in (there, back):
        assert "f32[1,2,4,16]" in text
        assert f"f32[{part}]" not in text
        assert "f32[12,2,4,16]" not in text


@pytest.mark.full
def test_floats_of_8_bits_go_as_bytes() -> None:
    """Not all GPUs have collectives of float8; and all codes come back as they were, NaN and minus zero too."""
    placement = ExpertPlacement(5, 4, [4, -1, 3, -1, 2, -1, 1, 0])
    layer = MoE(UNEVEN, mesh=mesh_of(1, 1, 4), placement=placement, rngs=nnx.Rngs(0))
    codes = np.random.default_rng(0).integers(0, 256, (8, 32, 16), np.uint8)
    codes[[1, 3, 5]] = 0
    stack = jax.device_put(codes.view(jnp.float8_e4m3fn), layer.w_down[...].sharding)
    order = logical._Slots(placement, stack.sharding, layer.expert_axes)
    experts = order.to_logical(stack)
    np.testing.assert_array_equal(np.asarray(experts).view(np.uint8), codes[[7, 6, 4, 2, 0]])
    back = order.to_physical(experts)
    assert back.dtype == stack.dtype
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8), codes)
    over = order._over(experts.shape)
    for lowered in (
        logical._to_logical.lower(stack, jnp.arange(5), over=over),
        logical._to_physical.lower(experts, jnp.arange(8), over=over),
    ):
        sent = re.findall(
            r"stablehlo.(?:all_reduce|all_gather).*?: \(tensor<[0-9x]*(\w+)>", lowered.as_text(), re.DOTALL
        )
        assert set(sent) == {"ui8"}


@pytest.mark.full
def test_misfits_are_refused_and_change_nothing() -> None:
    layer = MoE(EVEN, mesh=mesh_of(1, 1, 4), placement="round_robin", rngs=nnx.Rngs(0))
    state, want = jaxmoe.logical_state(layer), np.asarray(layer(X)[0])
    for bad, message in [
        (
            {name: value for name, value in state.items() if name != "w_down"},
            "the module has, the state has not 'w_down'",
        ),
        ({**state, "w_up": state["w_down"]}, "the state has, the module has not 'w_up'"),
        (
            {**state, "w_down": state["w_down"][:7]},
            r"w_down is float32 \(8, 16, 4\) in logical order; got float32 \(7, 16, 4\)",
        ),
        (
            {**state, "w_router": state["w_router"].astype(jnp.bfloat16)},
            r"w_router is float32 \(8, 16\).*got bfloat16.*cast",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            jaxmoe.load_logical_state(layer, bad)
    np.testing.assert_array_equal(layer(X)[0], want)
    host = {name: np.asarray(value) for name, value in state.items()}
    jaxmoe.load_logical_state(layer, host)
    np.testing.assert_array_equal(layer(X)[0], want)
