"""The arrays that a layer keeps of the tokens seen so far, described before they exist, and functions that write them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxmoe.numerics import int32


@dataclasses.dataclass(frozen=True)
class CacheArray:
    """One array of a layer's cache, before it exists.

    Attributes:
        shape: global shape; dim 0 is the batch.
        dims: mesh axis that each dim after the batch is sharded over.
        dtype: name of the dtype; None for the model's own.
        by_position: whether it has a place for each position, which a later token of that position writes over; otherwise
            it is what all tokens together have left, and of several tokens at once it comes back as each of them left it,
            [B, S, ...].
    """

    shape: tuple[int, ...]
    dims: tuple[str | None, ...] = ()
    dtype: str | None = None
    by_position: bool = True

    def spec(self, batch: tuple[str, ...]) -> P:
        """The array's partition spec, with the batch dim sharded over the axes `batch`."""
        return P(batch, *self.dims)


def cache_specs(arrays: Any, batch: tuple[str, ...]) -> Any:
    """Give the partition specs of a layer's cache: `arrays` with the spec of every `CacheArray` in its place."""
    return jax.tree.map(lambda array: array.spec(batch), arrays)


def accepted(arrays: Any, cache: Any, index_B: jax.Array) -> Any:
    """Go back to the cache as one of several tokens at once has left it, where a row's later ones are not to count.

    Args:
        arrays: a layer's cache as a pytree of `CacheArray`.
        cache: the same as the layer gave it after S > 1 tokens.
        index_B: int32, number of the last token of each row that counts, 0..S-1.
    """

    def one(array: CacheArray, value: jax.Array) -> jax.Array:
        if array.by_position:
            return value
        return jnp.take_along_axis(value, index_B.reshape(-1, *[1] * (value.ndim - 1)), axis=1)[:, 0]

    return jax.tree.map(one, arrays, cache)


def write_prompt(cache: jax.Array, new: jax.Array) -> jax.Array:
    """Write the values [B, ..., S, h] of a prompt at the start of a cache [B, ..., C, h]; returns the cache."""
    return jax.lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0,) * cache.ndim)


def write_prompts(cache: Any, new: Any) -> tuple[Any, Any]:
    """Write the arrays of a prompt at the start of a layer's cache, and give both back: the cache, and what was written.

    What comes back is there once the cache is written. Left to itself XLA writes the caches of all layers at the end of the
    program and keeps what every layer has made until then, which is as much memory as the prompt's cache takes again.
    """
    return jax.lax.optimization_barrier((jax.tree.map(write_prompt, cache, new), new))


def write_token(cache: jax.Array, new: jax.Array, position_B: jax.Array) -> jax.Array:
    """Write values [B, ..., S, h] at each row's own positions, from the given one on, of a cache [B, ..., C, h]."""
    # A slice update per row is done in place; a scatter over rows is a serial loop on CPU.
    between = (0,) * (cache.ndim - 3)
    for row in range(cache.shape[0]):
        update = new[row : row + 1].astype(cache.dtype)
        cache = jax.lax.dynamic_update_slice(cache, update, int32(row, *between, position_B[row], 0))
    return cache
