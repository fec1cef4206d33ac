"""Large arrays that a loop reads and writes a part at a time, so that a trip costs the part and not the whole.

XLA for CPU (jax 0.10) does in float32 what it has no bfloat16 instruction for, slices and updates among it. Left to
itself it converts a stack of matrices as a whole ahead of the loop, in twice its memory, and an array of results as a whole
in every trip.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def tied(stack: jax.Array, index: Any) -> jax.Array:
    """`stack`, for XLA another one in each trip of the loop that `index` changes in.

    A conversion has to wait for the slice then, and enters its fusion.
    """
    return lax.optimization_barrier((stack, index))[0]


def take_group(stack: jax.Array, group: jax.Array) -> jax.Array:
    """One group's part of a stack, inside a loop over groups."""
    return lax.dynamic_index_in_dim(tied(stack, group), group, keepdims=False)


def to_bits(array: jax.Array) -> jax.Array:
    """Turn a bfloat16 array into what a loop carries in its place: integers, which are never converted."""
    return lax.bitcast_convert_type(array, jnp.uint16) if array.dtype == jnp.bfloat16 else array


def from_bits(array: jax.Array, dtype: Any) -> jax.Array:
    """The array of `dtype` behind `to_bits`."""
    return lax.bitcast_convert_type(array, dtype) if array.dtype != dtype else array
