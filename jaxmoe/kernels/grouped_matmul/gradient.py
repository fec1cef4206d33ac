"""The backward pass of a function that is applied to the rows of each group with that group's matrices.

Nothing but the inputs is kept from the forward pass: a tile's products are computed again, in the dtype of sums, where
they are needed, so that training stores no activation of the experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmoe.kernels.dtypes import sum_dtype
from jaxmoe.kernels.grouped_matmul.loop_arrays import from_bits, take_group, to_bits
from jaxmoe.kernels.grouped_matmul.tiles import MIN_TILE, filled_groups, mark_varying, rows_per_tile


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
        load: what is constant for a group, such as matrices that it decodes; called once for one that has rows.
        tile_fn: from what `load` gives, one group's part of `stacks` and rows [m, K] to rows [m, N]; differentiable,
            rows independent.
        stacks: arrays [G, ...].
        x_RK: rows sorted by group.
        group_sizes_G: int32, rows of each group.
        dy_RN: the cotangent of y.
        varying: mesh axes over which all of these vary, see `tiles.varying_axes`.

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
            first = jnp.minimum(row, R - m)  # as in `tiles.map_tiles`
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
