"""The repetition penalty makes a token that was seen less likely, whatever the sign of its logit."""

import jax.numpy as jnp
import numpy as np

from jaxmoe.generation.sampling import penalize_repetition


def test_positive_logits_are_divided_and_negative_ones_multiplied():
    logits = jnp.array([[2.0, -2.0, 0.0, 3.0, -3.0]])
    seen = jnp.array([[True, True, True, False, False]])
    np.testing.assert_allclose(penalize_repetition(logits, seen, 4.0), [[0.5, -8.0, 0.0, 3.0, -3.0]])
    np.testing.assert_allclose(penalize_repetition(logits, seen, 0.5), [[4.0, -1.0, 0.0, 3.0, -3.0]])
