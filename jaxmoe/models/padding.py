"""Batches of prompts of different lengths: their padded length, and the positions of their tokens."""

import jax
import jax.numpy as jnp

_SMALLEST_BUCKET = 16


def prompt_positions(lengths_B: jax.Array, S: int) -> tuple[jax.Array, jax.Array]:
    """Compute positions of prompts padded to S, and a mask of their tokens; padding stands where the last token does.

    So a row's largest position tells the prompt's own length, which some position embeddings depend on.
    """
    index_1S, lengths_B1 = jnp.arange(S, dtype=jnp.int32)[None], lengths_B[:, None]
    return jnp.minimum(index_1S, jnp.maximum(lengths_B1 - 1, 0)), index_1S < lengths_B1


def bucket_length(length: int, limit: int | None = None) -> int:
    """Round a length up, so that few different ones are ever compiled.

    Powers of two from 16 up; above 512 also the middle between two of them, so that a long cache
    is at most a third larger than needed.

    Args:
        length: number of tokens needed, at most `limit`.
        limit: bound that is never exceeded (a model's last position); None for none.

    Example:
        >>> [bucket_length(n, limit=4000) for n in (1, 17, 300, 600, 800, 3800)]
        [16, 32, 512, 768, 1024, 4000]
    """
    power = max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    middle = power * 3 // 4
    rounded = middle if power > 512 and length <= middle else power
    return rounded if limit is None else min(limit, rounded)
