"""The tiles of groups as a kernel finds them, outside of the kernels: in Pallas's own interpreter."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxmoe.kernels.grouped_matmul.group_tiles import GroupTiles, offsets_shape


def row_tiles(sizes, R, m):
    """(group, row, first, last) of every tile of `m` rows over R rows in groups of those sizes, in their order."""
    used, *columns = _row_tiles(jnp.asarray(sizes, jnp.int32), R, m)
    return np.stack(columns, 1)[: int(used[0])].tolist()


@partial(jax.jit, static_argnums=(1, 2))
def _row_tiles(sizes_G, R, m):
    G = len(sizes_G)
    most = (R + 7 * G) // m + G

    def kernel(sizes, offsets, used, *columns):
        layout = GroupTiles(sizes, offsets, R, m)
        layout.fill()
        used[0] = layout.used

        def one(number, nothing):
            group = layout.group_of(number)
            for column, value in zip(columns, (group, *layout.place(number, group)), strict=True):
                column[number] = value

        jax.lax.fori_loop(0, layout.used, one, None)

    shapes = [offsets_shape(G), (1,), *[(most,)] * 4]
    out = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    return pl.pallas_call(kernel, out_shape=out, interpret=True)(sizes_G)[1:]
