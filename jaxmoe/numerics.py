"""Numerics that kernels, dispatches and layers share: activations, and dtypes that follow from what is computed."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Activation = Callable[[jax.Array], jax.Array]


def relu2(x: jax.Array) -> jax.Array:
    """Squared rectifier, max(x, 0)² (So et al., 2021, "Primer")."""
    return jnp.square(jax.nn.relu(x))


# Elementwise, by the names that checkpoints use.
ACTIVATIONS: dict[str, Activation] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": relu2,
}

# Bound of the half without a gate in the activation "situ", a constant of the released model.
SITU_UP_LIMIT = 25.0


def zeros_behind(x: jax.Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.Array:
    """Make zeros for a loop to fill, once `x` is there.

    XLA makes zeros that wait for nothing at the start of a program, those of all layers at once, and there they stay until
    each layer comes to its own.
    """
    zero, _ = jax.lax.optimization_barrier((jnp.zeros((), dtype), x))
    return jnp.broadcast_to(zero, shape)


def sum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of sums over numbers of `dtype`: float64 for float64, else float32, however JAX is set up."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def int32(*starts: jax.Array | int) -> tuple[jax.Array, ...]:
    """Starts of a slice in one dtype, as JAX wants them: a Python number would be int64 where JAX has 64 bits."""
    return tuple(jnp.asarray(start, jnp.int32) for start in starts)
