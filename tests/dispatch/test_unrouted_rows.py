"""Tokens without an expert, and choices of none: what they hold reaches no sum and no gradient of any backend."""

import jax
import numpy as np
import pytest

from jaxmoe.dispatch import DISPATCHES
from tests.support.dispatch_programs import program

pytestmark = pytest.mark.covering(most=3)

VARIANTS = [{}, {"tight": True, "replicas": True}, {"tight": True, "weights_on_input": True}]


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
@pytest.mark.parametrize("backend", DISPATCHES)
def test_they_are_never_multiplied(backend, variant):
    run = program(backend=backend, mesh_shape=(1, 2, 4), expert_axes=("ep",), T=24, **variant)

    def pull_back(x_TD, slots_TK, weights_TK, *stacks):
        def y_of(x_TD, weights_TK):
            return run.body(x_TD, slots_TK, weights_TK, *stacks[:2])[0]

        y_TD, pull = jax.vjp(y_of, x_TD, weights_TK)
        return y_TD, pull(y_TD + x_TD)  # a cotangent that holds what the row holds

    compiled = run.lower(pull_back).compile()
    rng = np.random.default_rng(0)
    ids_TK = np.argsort(rng.random((run.T, 11)), axis=1)[:, : run.K]
    ids_TK[rng.random(ids_TK.shape) < 0.3] = -1
    ids_TK[:5] = ids_TK[10] = -1  # the first ones stand for the unused places of a buffer
    none_T = (ids_TK < 0).all(axis=1)
    weights_TK = rng.uniform(0.1, 1, ids_TK.shape).astype(np.float32)
    slots_TK = run.slots(ids_TK).astype(np.int32)
    stacks = list(map(run.stack, run.inputs[1:]))

    def results(bad):
        x_TD = np.where(none_T[:, None], bad, run.inputs[0]).astype(np.float32)
        return compiled(x_TD, slots_TK, np.where(ids_TK < 0, bad, weights_TK).astype(np.float32), *stacks)

    y_TD, (dx_TD, dweights_TK) = clean = results(0)
    np.testing.assert_allclose(y_TD, run.expected(ids_TK, weights_TK), atol=1e-5)
    assert np.isfinite(dx_TD).all()
    assert not np.asarray(dweights_TK)[ids_TK < 0].any()
    for bad in (np.nan, np.inf):
        jax.tree.map(np.testing.assert_array_equal, results(bad), clean)
