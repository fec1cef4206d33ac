"""A rebalance in the middle of a training: what an optimizer has for an expert goes where the expert goes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxmoe
from jaxmoe import ExpertPlacement, MoE, MoEConfig
from jaxmoe.config import MLPConfig
from jaxmoe.layers import swap
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=2)

E, D, EP, SLOTS, STEPS = 5, 8, 4, 8, 6
CONFIG = MoEConfig(
    num_experts=E,
    num_experts_per_tok=2,
    hidden_size=D,
    moe_intermediate_size=4,
    shared=MLPConfig(hidden_size=D, intermediate_size=4),
)
FIRST = ExpertPlacement(E, EP, [0, 1, 2, 3, 4, -1, -1, -1])
OTHERS = [ExpertPlacement(E, EP, [4, -1, 3, -1, 2, -1, 1, 0]), ExpertPlacement(E, EP, [-1, 0, 2, 4, 1, -1, -1, 3])]
X, TARGET = jax.random.normal(jax.random.key(0), (2, 24, D))


def labels(params):
    return jax.tree.map(lambda param: "matrices" if param.ndim > 2 else "others", params)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "plain": lambda: optax.sgd(1e-1),
    "two": lambda: optax.multi_transform({"matrices": optax.adam(1e-2), "others": optax.sgd(1e-2)}, labels),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "moments in bfloat16": lambda: optax.adam(1e-2, mu_dtype=jnp.bfloat16),
}


class Stack(nnx.Module):
    """A module of a user's own, with layers that have a dense part beside the experts."""

    def __init__(self, layers: int):
        mesh = mesh_of(1, 2, EP)
        self.layers = nnx.List([MoE(CONFIG, mesh=mesh, placement=FIRST, rngs=nnx.Rngs(i)) for i in range(layers)])
        self.out = nnx.Param(jax.device_put(jnp.ones(D), jax.NamedSharding(mesh, jax.P())))

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        for layer in self.layers:
            x_TD = x_TD + layer(x_TD)[0]
        return x_TD * self.out[...]


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
    loss, gradients = nnx.value_and_grad(lambda model: jnp.mean(jnp.square(model(X) - TARGET)))(model)
    optimizer.update(model, gradients)
    return loss


def losses_of(make, placements=(), *, with_optimizer=True) -> list[float]:
    """Losses of a training, with a rebalance before the third step, the fourth, ..."""
    model = Stack(2)
    optimizer = nnx.Optimizer(model, make(), wrt=nnx.Param)
    losses = []
    for i in range(STEPS):
        if 0 <= i - 2 < len(placements):
            jaxmoe.rebalance(model, placements[i - 2], optimizer=optimizer if with_optimizer else None)
            assert model.layers[1].placement == placements[i - 2]
        losses.append(float(step(model, optimizer)))
    return losses


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_losses_are_those_of_a_training_without_a_rebalance(make) -> None:
    want = losses_of(make)
    np.testing.assert_allclose(losses_of(make, OTHERS), want, rtol=1e-5)
    assert want[-1] < want[0]


def test_moments_that_are_left_behind_belong_to_other_experts() -> None:
    """What the argument is for, and that the test above can fail."""
    left = losses_of(OPTIMIZERS["adamw"], OTHERS, with_optimizer=False)
    assert not np.allclose(left, losses_of(OPTIMIZERS["adamw"]), rtol=1e-3)


def test_moments_of_a_model_follow_its_experts() -> None:
    model = jaxmoe.load(
        GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 4), placement=ExpertPlacement.linear(11, 4)
    )
    after = ExpertPlacement(11, 4, [10, -1, 9, 8, 0, 1, 2, 3, 7, 6, 5, 4])
    state = optax.adam(1e-3).init(nnx.state(model, nnx.Param))

    def of_layer(layer: int) -> list[nnx.Variable]:
        return [tree["layers"][layer]["moe"].w_down for tree in (state[0].mu, state[0].nu)]

    stack = model.layers[1].moe.w_down
    by_expert = np.arange(11, dtype=np.float32)
    for moment in of_layer(1):  # as made under jit, on one device
        slots = model.placements[1].slot_to_expert
        moment.set_value(jnp.asarray(np.broadcast_to(by_expert[slots][:, None, None], stack.shape)))
    moved = jaxmoe.rebalance(model, ["linear", after], optimizer=state)
    stacks = model.layers[1].moe.expert_stacks()
    changed = np.count_nonzero(after.slot_to_expert[[*range(12)]] != ExpertPlacement.linear(11, 4).slot_to_expert) - 1
    assert moved.total == 3 * changed * sum(stack.nbytes // 12 for stack in stacks)
    for moment in of_layer(1):
        assert moment.get_value().sharding == stack.get_value().sharding
        held = after.slot_to_expert >= 0
        assert np.asarray(moment[...])[held, 0, 0].tolist() == after.slot_to_expert[held].tolist()


def test_a_device_without_room_leaves_weights_and_moments_as_they_were(monkeypatch) -> None:
    model = Stack(1)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    step(model, optimizer)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state((model, optimizer)))]
    takes, take = [], swap._take

    def counted(*args, **kwargs):
        takes.append(1)
        if len(takes) == 2 * EP:
            raise MemoryError("no room")
        return take(*args, **kwargs)

    monkeypatch.setattr(swap, "_take", counted)
    with pytest.raises(MemoryError, match="no room"):
        jaxmoe.rebalance(model, OTHERS[0], optimizer=optimizer)
    after = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state((model, optimizer)))]
    held = FIRST.slot_to_expert >= 0
    for old, new in zip(before, after, strict=True):
        both = [array[held] if len(array.shape) > 2 else array for array in (old, new)]
        np.testing.assert_array_equal(*both)


def refused(model: nnx.Module, optimizer, message: str) -> None:
    before = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    with pytest.raises(ValueError, match=message):
        jaxmoe.rebalance(model, OTHERS[0], optimizer=optimizer)
    for old, new in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_an_optimizer_that_cannot_go_along_is_refused() -> None:
    model = Stack(1)
    params = nnx.state(model, nnx.Param)
    by_rows = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    refused(
        model,
        nnx.Optimizer(model, by_rows, wrt=nnx.Param),
        r"shape of the stack: layers.0.w_\w+ is \(8, .* and the optimizer has \(8, .* make a new optimizer after it",
    )
    refused(
        model,
        optax.adam(1.0).init(nnx.to_pure_dict(params)),
        r"for layers.0.w_down it has a bare ArrayImpl; give an nnx",
    )
    refused(
        model.layers[0],
        nnx.Optimizer(model, optax.adam(1.0), wrt=nnx.Param),
        r"it has 'out', which this MoE has not; give jaxmoe.rebalance the module that the optimizer was made for",
    )
    frozen = nnx.Optimizer(model, optax.adam(1.0), wrt=lambda path, _: path[-1] == "out")
    assert jaxmoe.rebalance(model, OTHERS[0], optimizer=frozen).total > 0
