"""Gradients for what XLA cannot differentiate, such as a kernel."""

from collections.abc import Callable
from typing import Any

import jax

from jaxmoe.kernels.grouped_matmul.tiles import mark_varying, varying_axes


def with_gradient_of(
    same: Callable[[Any, jax.Array], jax.Array],
    forward: Callable[[Any, jax.Array], jax.Array],
    arrays: Any,
    group_sizes_G: jax.Array,
) -> jax.Array:
    """`forward(arrays, group_sizes)`, with the gradient of `same(arrays, group_sizes)` in `arrays`.

    Neither function may close over arrays that are being traced: JAX takes gradients after they are gone.

    Args:
        same: what XLA can differentiate, and computes what `forward` does.
        forward: what is called.
        arrays: a pytree of what may be differentiated.
        group_sizes_G: int32, rows of each group.
    """
    varying = varying_axes(*jax.tree.leaves(arrays), group_sizes_G)
    # All of one type inside `shard_map`, as a custom rule needs it; the transpose of this sums gradients over the mesh.
    arrays = jax.tree.map(lambda array: mark_varying(array, varying - varying_axes(array)), arrays)

    def pullback(inputs: tuple[Any, jax.Array], dy: jax.Array) -> tuple[Any, None]:
        arrays, group_sizes_G = inputs
        _, pull = jax.vjp(lambda arrays: same(arrays, group_sizes_G), arrays)
        return *pull(dy), None

    function = jax.custom_vjp(forward)
    function.defvjp(lambda *inputs: (forward(*inputs), inputs), pullback)
    return function(arrays, group_sizes_G)
