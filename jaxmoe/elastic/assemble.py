"""Carrying a relocation out: shards of the new array from pieces of the old one's."""

from functools import partial

import jax
import jax.numpy as jnp

from jaxmoe.checkpoint.boxes import box_shape
from jaxmoe.elastic.relocate import Piece, Relocation
from jaxmoe.layers.in_place import update_slice
from jaxmoe.layers.param import ParamSpec


def assemble(
    old: jax.Array, new: ParamSpec, relocation: Relocation, repeats: tuple[int, ...] | None = None
) -> jax.Array:
    """The parameter on its new devices. What stays where it is, whole, is not copied: the two arrays share it.

    Args:
        old: parameter on its old devices.
        new: spec of it on the new ones.
        relocation: source of each region.
        repeats: times that each element stands along each dim in what `relocation` counts, as scales do whose blocks
            become smaller; None for once.
    """
    shards = {shard.device: shard.data for shard in old.addressable_shards}
    if repeats is not None and max(repeats, default=1) > 1:
        shards = {device: _repeated(data, repeats) for device, data in shards.items()}
    arrays = []
    for device, pieces in relocation.pieces.items():
        shape = box_shape(relocation.boxes[device])
        arrays.append(_shard(shards, pieces, shape, new.dtype, device))
    return jax.make_array_from_single_device_arrays(new.shape, new.sharding, arrays)


def _shard(
    shards: dict[jax.Device, jax.Array],
    pieces: list[Piece],
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    device: jax.Device,
) -> jax.Array:
    if len(pieces) == 1 and pieces[0].shape == shape:
        return jax.device_put(_take(shards, pieces[0]), device)
    whole = jnp.zeros(shape, dtype, device=device)
    for piece in pieces:
        whole = _insert(whole, jax.device_put(_take(shards, piece), device), piece.start)
        # One piece in flight at a time: a device needs room for the new shard and one piece.
        whole.block_until_ready()
    return whole


def _take(shards: dict[jax.Device, jax.Array], piece: Piece) -> jax.Array:
    data = shards[piece.source]
    return data if piece.shape == data.shape else _slice(data, piece.source_start, piece.shape)


@partial(jax.jit, static_argnums=1)
def _repeated(data: jax.Array, repeats: tuple[int, ...]) -> jax.Array:
    for dim, times in enumerate(repeats):
        data = jnp.repeat(data, times, axis=dim)
    return data


@partial(jax.jit, static_argnums=2)
def _slice(data: jax.Array, start: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(data, start, shape)


@partial(jax.jit, donate_argnums=0)
def _insert(whole: jax.Array, piece: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return update_slice(whole, piece, start)
