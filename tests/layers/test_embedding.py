"""The table of a vocabulary over tp ranks that it does not divide over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmoe.layers import ParamFactory, VocabTable
from tests.support.meshes import mesh_of


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_and_logits_are_those_of_the_vocabulary(tp, bias):
    mesh = mesh_of(1, tp, 1)
    table = VocabTable(7, 3, param=ParamFactory(mesh, jnp.float32, nnx.Rngs(0)), bias=bias)
    weight = np.asarray(table.weight[...])
    tokens = np.array([[0, 3, 4, 6]])
    embedded, logits = jax.jit(lambda tokens: (x := table.embed(tokens, ()), table.logits(x, ())))(tokens)
    np.testing.assert_array_equal(embedded, weight[tokens])
    assert logits.shape == (1, 4, 7)
    np.testing.assert_allclose(logits, weight[tokens] @ weight[:7].T, atol=1e-6)
