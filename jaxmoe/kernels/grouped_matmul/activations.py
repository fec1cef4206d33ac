"""Activations of the gate, by the names that checkpoints use."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

Activation = Callable[[jax.Array], jax.Array]


def relu2(x: jax.Array) -> jax.Array:
    """Squared rectifier, max(x, 0)² (So et al., 2021, "Primer")."""
    return jnp.square(jax.nn.relu(x))


# Elementwise; backends call them on float32, before the product with `up`.
ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": relu2,
}
