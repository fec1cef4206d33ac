"""Memory of the compiled programs, and what bfloat16 costs in accuracy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.dispatch import DISPATCHES
from tests.support.dispatch_programs import Program, program
from tests.support.oracle import silu
from tests.support.routings import draw_ids

pytestmark = pytest.mark.covering(most=3)

RUNS_HERE = [name for name, backend in DISPATCHES.items() if "cpu" not in backend.cannot_run]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(("mesh_shape", "K"), [((1, 1, 8), 1), ((2, 2, 2), 8)])
@pytest.mark.parametrize("backend", RUNS_HERE)
def test_workspace_is_the_one_modeled(backend, mesh_shape, K):
    """Of a compiled program, and so of every routing that it serves."""
    run = Program(backend=backend, mesh_shape=mesh_shape, expert_axes=("ep",), T=4096, K=K)
    modeled = run.dispatch.memory_bytes(run.shape)
    # Indices are as large as rows here: an int32 or two for each pair and for each choice that travels.
    pairs = run.T * (K + 1) * 4
    assert run.compiled.memory_analysis().temp_size_in_bytes < 1.1 * modeled + 16 * pairs


def test_all_to_one_takes_rounds_and_no_memory():
    """One program serves both routings: its memory is the same for both."""
    run = program(backend="all_to_all", mesh_shape=(1, 1, 8), expert_axes=("ep",))
    weights_TK = np.ones((run.T, run.K))
    even = run.slots(np.arange(run.T * run.K).reshape(run.T, run.K) % 11)
    _, few = run(even, weights_TK)
    _, many = run(run.slots(np.full((run.T, run.K), 4)), weights_TK)
    assert int(few.rounds) == 1
    assert int(many.rounds) == 2


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("backend", list(DISPATCHES))
def test_one_token_that_is_not_finite_spoils_no_other(backend):
    run = Program(backend=backend, mesh_shape=(2, 2, 2), expert_axes=("ep",), T=72, tight=True)
    x_TD, *stacks = run.inputs
    x_TD[[0, 40]] = np.nan
    ids_TK = draw_ids("uniform", 0, run.T, run.K, 8)
    weights_TK = np.ones(ids_TK.shape, np.float32)
    y_TD, _ = run(run.slots(ids_TK), weights_TK)
    assert np.isnan(y_TD[[0, 40]]).all()
    others = np.delete(np.arange(run.T), [0, 40])
    np.testing.assert_allclose(y_TD[others], run.expected(ids_TK, weights_TK)[others], atol=1e-5)


def dense_bfloat16(run: Program, ids_TK: np.ndarray, weights_TK: np.ndarray) -> np.ndarray:
    """Experts one by one in bfloat16, each result rounded to it, and a float32 sum."""
    x_TD, w_gate_up, w_down = run.inputs
    gate, up = np.einsum("td,ehfd->hetf", *(array.astype(np.float64) for array in (x_TD, w_gate_up)))
    h = (silu(gate) * up).astype(jnp.bfloat16).astype(np.float64)
    outs_TED = np.einsum("etf,edf->ted", h, w_down.astype(np.float64)).astype(jnp.bfloat16).astype(np.float64)
    outs_TKD = np.take_along_axis(outs_TED, ids_TK[:, :, None], axis=1)
    return (weights_TK[:, :, None] * outs_TKD).sum(axis=1)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("mesh_shape", [(1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("backend", RUNS_HERE)
def test_bfloat16_is_no_worse_than_a_dense_layer(backend, mesh_shape):
    """Root mean square against float64, of results rounded to bfloat16; a device's sum is rounded once on its way."""
    run = program(backend=backend, mesh_shape=mesh_shape, expert_axes=("ep",), dtype="bfloat16", T=4096)
    ids_TK = draw_ids("uniform", 0, run.T, run.K, 8)
    weights_TK = np.random.default_rng(0).dirichlet(np.ones(run.K), size=run.T).astype(np.float32)
    y_TD, _ = run(run.slots(ids_TK), weights_TK)
    exact = run.expected(ids_TK, weights_TK)

    def error(y_TD: np.ndarray) -> float:
        return np.sqrt(np.mean((y_TD.astype(jnp.bfloat16).astype(np.float64) - exact) ** 2))

    scale = np.sqrt(np.mean(exact**2))
    assert error(y_TD) < 1.03 * error(dense_bfloat16(run, ids_TK, weights_TK))
    assert error(y_TD) < 2**-8 * scale
