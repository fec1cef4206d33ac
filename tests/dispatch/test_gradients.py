"""Gradients through every backend against those of a dense layer, and the memory they take."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.dispatch import DISPATCHES
from jaxmoe.dispatch.rounds import Bodies, sum_rounds
from tests.support.dispatch_programs import LAYOUTS, D, E, Program, program
from tests.support.routings import draw_ids

pytestmark = pytest.mark.covering(most=4)

# One round and one trip; many rounds and trips; replicas with padding slots between them; weights that go in.
VARIANTS = [{}, {"tight": True}, {"tight": True, "replicas": True}, {"tight": True, "weights_on_input": True}]
PROGRAMS = [
    {"backend": backend, "mesh_shape": shape, "expert_axes": axes, "T": 72, **VARIANTS[(i + b) % len(VARIANTS)]}
    for i, (shape, axes) in enumerate(layout for layout in LAYOUTS if layout[0] in ((2, 2, 2), (1, 2, 4)))
    for b, backend in enumerate(DISPATCHES)
]


def gradients(run: Program):
    """A compiled ``(x, slots, weights, stacks..., dy) -> (y, gradients of Σ dy · y)``."""
    x_TD, *stacks = run.inputs
    dy_TD = np.random.default_rng(9).normal(size=x_TD.shape).astype(np.float32)

    def pull_back(x_TD, slots_TK, weights_TK, *stacks):
        def y_of(x_TD, weights_TK, *stacks):
            return run.body(x_TD, slots_TK, weights_TK, *stacks)[0]

        y_TD, pull = jax.vjp(y_of, x_TD, weights_TK, *stacks)
        return y_TD, pull(dy_TD)

    return run.lower(pull_back).compile(), dy_TD


@partial(jax.jit, static_argnames=("K", "weights_on_input"))
def dense_gradients(ids_TK, dy_TD, *inputs, K: int, weights_on_input: bool):
    """The same by automatic differentiation of every expert applied to every token."""

    def dense(x_TD, weights_TK, w_gate_up, w_down):
        def experts(x_TD):
            gate, up = jnp.einsum("td,ehfd->hetf", x_TD, w_gate_up)
            return jnp.einsum("etf,edf->ted", jax.nn.silu(gate) * up, w_down)

        y_TD = 0
        for k in range(K):
            chosen_TE = ids_TK[:, k, None] == np.arange(E)
            if weights_on_input:
                y_TD += jnp.sum(chosen_TE[:, :, None] * experts(x_TD * weights_TK[:, k, None]), axis=1)
            else:
                y_TD += jnp.sum((chosen_TE * weights_TK[:, k, None])[:, :, None] * experts(x_TD), axis=1)
        return jnp.sum(y_TD * dy_TD)

    with jax.default_matmul_precision("highest"):
        return jax.grad(dense, argnums=(0, 1, 2, 3))(*inputs)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("settings_of", PROGRAMS, ids=lambda s: "-".join(map(str, s.values())).replace(" ", ""))
def test_equal_those_of_a_dense_layer(settings_of):
    run = program(**settings_of)
    compiled, dy_TD = gradients(run)
    for kind, seed in [("uniform", 0), ("hot_expert", 1), ("masked_tokens", 2), ("idle_sources", 3)]:
        ids_TK = draw_ids(kind, seed, run.T, run.K, 8)
        weights_TK = np.random.default_rng(seed).uniform(0.1, 1, size=ids_TK.shape).astype(np.float32)
        slots_TK = run.slots(ids_TK).astype(np.int32)
        y_TD, (dx, dweights, *dstacks) = compiled(run.inputs[0], slots_TK, weights_TK, *map(run.stack, run.inputs[1:]))
        np.testing.assert_allclose(y_TD, run.expected(ids_TK, weights_TK), atol=1e-5)
        x_TD, *stacks = run.inputs
        options = {"K": run.K, "weights_on_input": run.weights_on_input}
        expected = dense_gradients(ids_TK, dy_TD, x_TD, weights_TK, *stacks, **options)
        # A replica's gradient is that of its own tokens: an expert's is the sum over its slots.
        slot_to_expert = run.placement.slot_to_expert
        totals = [np.zeros((E, *stack.shape[1:]), np.float32) for stack in dstacks]
        for total, stack in zip(totals, dstacks, strict=True):
            np.add.at(total, slot_to_expert[slot_to_expert >= 0], np.asarray(stack)[slot_to_expert >= 0])
            assert not np.asarray(stack)[slot_to_expert < 0].any()
        for ours, theirs in zip((dx, dweights, *totals), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * max(1, np.abs(theirs).max()))


@pytest.mark.full
def test_memory_of_the_backward_pass_follows_from_shapes():
    """Nothing is kept of a round: twice the forward pass's workspace and the gradients, whatever the rounds."""
    few, many = (
        Program(backend="all_to_all", mesh_shape=(1, 1, 8), expert_axes=("ep",), T=4096, K=1, tight=tight)
        for tight in (False, True)
    )
    workspaces = []
    for run in (few, many):
        compiled, _ = gradients(run)
        workspaces.append(compiled.memory_analysis().temp_size_in_bytes)
        forward = run.compiled.memory_analysis().temp_size_in_bytes
        assert workspaces[-1] < 3 * forward + 4 * run.T // 8 * D * 4
    # Many small rounds take less than one large one: there is no residual a round.
    assert workspaces[1] < workspaces[0]


def test_sum_of_rounds():
    def body(index, inputs, constants):
        return inputs["w"] * inputs["x"] ** 2 * constants[index]

    constants = jnp.array([1.0, 2.0, 4.0])
    inputs = {"w": jnp.array([3.0, 5.0]), "x": jnp.array([1.0, 2.0])}
    for rounds, factor in ((0, 0), (1, 1), (jnp.int32(1), 1), (jnp.int32(3), 7)):
        y, pull = jax.vjp(
            lambda inputs, rounds=rounds: sum_rounds(Bodies(body, body), rounds, inputs, constants), inputs
        )
        np.testing.assert_allclose(y, factor * np.array([3.0, 20.0]))
        (grads,) = pull(jnp.ones(2))
        np.testing.assert_allclose(grads["w"], factor * np.array([1.0, 4.0]))
        np.testing.assert_allclose(grads["x"], factor * np.array([6.0, 20.0]))
