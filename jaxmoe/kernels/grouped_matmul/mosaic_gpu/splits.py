"""Products of so few rows that tiles of all outputs leave multiprocessors idle: the inner dimension is shared out, too.

Decoding reads matrices at the pace of the multiprocessors that ask for them. Each multiplies a part of the inner dimension,
and a second kernel, XLA's, adds the parts up in their order, so that the same rows have the same results in every run,
which sums in the order of arrival would not have. Letters: G groups, H halves, N and K of a matrix [N, K], S parts.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from jaxmoe.kernels.grouped_matmul.mosaic_gpu import kernel
from jaxmoe.kernels.grouped_matmul.mosaic_gpu.tiles import Tiles


@partial(jax.jit, static_argnames=("tiles", "finish", "out_dtype", "blocks", "interpret"))
def multiply(
    rows_RK: jax.Array,
    matrices_GHNK: jax.Array,
    biases_GHN: jax.Array | None,
    group_sizes_G: jax.Array,
    tiles: Tiles,
    finish: Callable[..., jax.Array],
    out_dtype: jnp.dtype,
    *,
    index_R: jax.Array | None = None,
    blocks: int,
    interpret: bool,
) -> jax.Array:
    """The same as `kernel.multiply`, of rows and matrices that are not packed, exponentials as XLA has them."""
    G, H, N, K = matrices_GHNK.shape
    options: dict[str, Any] = {"index_R": index_R, "approximate": False, "blocks": blocks, "interpret": interpret}
    biases = None if biases_GHN is None else biases_GHN.reshape(G, 1, H * N)
    one_matrix = matrices_GHNK.reshape(G, 1, H * N, K)
    arrays = (rows_RK, one_matrix, biases, group_sizes_G)
    parts = kernel.multiply(*arrays, tiles, _identity, jnp.dtype(jnp.float32), **options)
    parts_SRHN = parts.reshape(tiles.splits, -1, H, N)
    sums_RHN = reduce(jnp.add, [parts_SRHN[part] for part in range(tiles.splits)])
    return finish(*(sums_RHN[:, h] for h in range(H))).astype(out_dtype)


def _identity(sums: jax.Array) -> jax.Array:
    return sums
