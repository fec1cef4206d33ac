"""Gradients: the backward pass of a function of each group's rows and matrices, and its loan to kernels that have none.

Nothing but the inputs is kept from the forward pass: a tile's products are computed again, in the dtype of sums, where
they are needed, so that training stores no activation of the experts.

Letters here, beside the common ones of docs/concepts/letters.md: G groups, K and N inner and outer dim, m rows of a
tile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.grouped_matmul.row_loops import (
    MIN_TILE,
    filled_groups,
    from_bits,
    mark_varying,
    rows_per_tile,
    take_group,
    to_bits,
    varying_axes,
)
from jaxmoe.numerics import sum_dtype


def group_gradients(
    load: Callable[[jax.Array], Any],
    tile_fn: Callable[[Any, Any, jax.Array], jax.Array],
    stacks: Any,
    x_RK: jax.Array,
    group_sizes_G: jax.Array,
    dy_RN: jax.Array,
    *,
    varying: frozenset[str],
) -> tuple[Any, jax.Array]:
    """Gradients of Σ dy · y with y[r] = tile_fn(load(g(r)), stacks[g(r)], x[r]).

    Of the stacks: for each group the sum over its own rows, added up in float32 and rounded once; zeros where a group is
    empty. Of x: one row each; zeros where no group owns the row. What x and dy hold there is never used, NaN included.

    Args:
        load: function from a group to constants of it, such as matrices that it decodes; called once for one with rows.
        tile_fn: function from those constants, one group's part of `stacks` and rows [m, K] to rows [m, N]; differentiable,
            rows independent.
        stacks: arrays [G, ...].
        x_RK: rows sorted by group.
        group_sizes_G: int32, rows of each group.
        dy_RN: the cotangent of y.
        varying: mesh axes over which all of these vary, see `row_loops.varying_axes`.

    Returns:
        The gradients, in the shapes and dtypes of `stacks` and x_RK.
    """
    R, G, wide = x_RK.shape[0], group_sizes_G.shape[0], sum_dtype(x_RK.dtype)
    # A single row makes a poor product: the matrices' gradients are outer products of tiles.
    m = min(R, max(MIN_TILE, rows_per_tile(R, G)))
    start_G, end_G, group_G, filled = filled_groups(R, group_sizes_G)

    def zeros(array: jax.Array) -> jax.Array:
        return mark_varying(to_bits(jnp.zeros(array.shape, array.dtype)), varying)

    def one_group(i: jax.Array, grads: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
        dstacks, dx_RK = grads
        group = group_G[i]
        start, end = start_G[group], end_G[group]
        # Widened before the products, so that no partial sum is rounded. The barrier keeps the slices out of the loop.
        constants, matrices = lax.optimization_barrier(
            (load(group), jax.tree.map(lambda stack: take_group(stack, group), stacks))
        )
        matrices = jax.tree.map(lambda matrix: matrix.astype(wide), matrices)

        def one_tile(t: jax.Array, grads: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            dmatrices, dx_RK = grads
            row = start + t * m
            first = jnp.minimum(row, R - m)  # as in `row_loops.map_tiles`
            row_m = first + jnp.arange(m, dtype=jnp.int32)
            own_m1 = ((row_m >= row) & (row_m < end))[:, None]

            def own_rows(rows: jax.Array) -> jax.Array:
                return jnp.where(own_m1, lax.dynamic_slice_in_dim(rows, first, m), 0).astype(wide)

            _, pullback = jax.vjp(partial(tile_fn, constants), matrices, own_rows(x_RK))
            of_tile, dx_mK = pullback(own_rows(dy_RN))
            before_mK = lax.dynamic_slice_in_dim(dx_RK, first, m)
            dx_mK = jnp.where(own_m1, to_bits(dx_mK.astype(x_RK.dtype)), before_mK)
            dx_RK = lax.dynamic_update_slice_in_dim(dx_RK, dx_mK, first, 0)
            return jax.tree.map(jnp.add, dmatrices, of_tile), dx_RK

        dmatrices, dx_RK = lax.fori_loop(
            0, (end - start + m - 1) // m, one_tile, (jax.tree.map(zeros, matrices), dx_RK)
        )
        dstacks = jax.tree.map(
            lambda dstack, dmatrix, stack: lax.dynamic_update_index_in_dim(
                dstack, to_bits(dmatrix.astype(stack.dtype)), group, 0
            ),
            dstacks,
            dmatrices,
            stacks,
        )
        return dstacks, dx_RK

    inputs = stacks, x_RK
    gradients = lax.fori_loop(0, filled, one_group, jax.tree.map(zeros, inputs))
    return jax.tree.map(lambda gradient, array: from_bits(gradient, array.dtype), gradients, inputs)


def with_gradient_of(
    same: Callable[[Any, Any], jax.Array],
    forward: Callable[[Any, Any], jax.Array],
    arrays: Any,
    groups: Any,
) -> jax.Array:
    """`forward(arrays, groups)`, with the gradient of `same(arrays, groups)` in `arrays`.

    Neither function may close over arrays that are being traced: JAX takes gradients after they are gone.

    Args:
        same: function that XLA can differentiate, and that computes what `forward` does.
        forward: function that is called.
        arrays: a pytree of what may be differentiated.
        groups: int32, rows of each group; or a pytree of that and of other integers.
    """

    def pullback(arrays: Any, groups: Any, dy: jax.Array) -> Any:
        _, pull = jax.vjp(lambda arrays: same(arrays, groups), arrays)
        return pull(dy)[0]

    return with_pullback(pullback, forward, arrays, groups)


def with_pullback(
    pullback: Callable[[Any, Any, jax.Array], Any],
    forward: Callable[[Any, Any], jax.Array],
    arrays: Any,
    groups: Any,
) -> jax.Array:
    """`forward(arrays, groups)`, with `pullback(arrays, groups, dy)` for the gradient of Σ dy · y in `arrays`.

    Neither function may close over arrays that are being traced; `groups` are as for `with_gradient_of`.
    """
    varying = varying_axes(*jax.tree.leaves((arrays, groups)))

    def vary(arrays: Any) -> Any:
        return jax.tree.map(lambda array: mark_varying(array, varying), arrays)

    # What a kernel gives has no such type; left at that, a gradient would be summed over the mesh on its way in.
    def typed(arrays: Any, groups: Any) -> jax.Array:
        return vary(forward(arrays, groups))

    def pull(inputs: tuple[Any, Any], dy: jax.Array) -> tuple[Any, None]:
        return vary(pullback(*inputs, dy)), None

    function = jax.custom_vjp(typed)
    function.defvjp(lambda *inputs: (typed(*inputs), inputs), pull)
    # All of one type inside `shard_map`, as a custom rule needs it; the transpose of this sums gradients over the mesh.
    return function(vary(arrays), groups)
