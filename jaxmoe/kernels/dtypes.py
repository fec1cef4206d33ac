"""Dtypes that follow from what is computed, and not from how JAX is set up: those of sums and of indices."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def sum_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype of sums over numbers of `dtype`: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def int32(*starts: jax.Array | int) -> tuple[jax.Array, ...]:
    """Where a slice starts, in one dtype as JAX wants it: a Python number would be int64 where JAX has 64 bits."""
    return tuple(jnp.asarray(start, jnp.int32) for start in starts)
