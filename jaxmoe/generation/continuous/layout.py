"""The cache of continuous batching: pages of what has a place for each position, and the rest slot by slot.

A layer is handed the cache that it knows, [B, ..., C, h] with position i at index i, put together from the pages of each
row; what it has written there for new positions goes back into pages. So every kind of layer takes part as it is. The view
of one layer exists while that layer is computed.

Letters here, beside the common ones of docs/concepts/letters.md: N pages, n pages of a row, p tokens of a page, e entries
of a page (p, or fewer where an entry stands for several tokens), C entries of a view, h width of an entry. On a device N
and B are its own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxmoe.generation.continuous.sizes import Sizes
from jaxmoe.layers import CacheArray
from jaxmoe.mesh import axes_size, batch_axes, named
from jaxmoe.models import Decoder

Store = Any

# Pages that tell an array with entries for each from one with entries for other runs of positions.
_MANY = 64


class CacheLayout:
    """The places of a model's cache, and the way from there into programs and back.

    Args:
        model: model whose layers they are, with weights or without.
        page: tokens of a page.
        length: most positions of a row, a multiple of `page`.

    Attributes:
        groups: parts of the mesh that have rows of their own.
        pageable: whether every array has a place for each position: pages are then all that a row has.
        takes_chunks: whether a prompt may go on from what its beginning has left.
    """

    def __init__(self, model: Decoder, page: int, length: int):
        self._mesh, self._dtype, self._page = model.mesh, model.dtype, page
        self._batch = batch_axes(model.mesh, model.mesh.size)
        self.groups = axes_size(model.mesh, self._batch)
        layers = model.layers[: model.config.num_main_layers]

        def arrays(length: int) -> Any:
            return tuple(layer.cache_arrays(1, length) for layer in layers)

        # No layer is kept: programs outlive their model otherwise.
        self._arrays, self._treedef = jax.tree.flatten(arrays(length))
        self._specs = [array.spec(self._batch) for array in self._arrays]
        both = zip(*(jax.tree.leaves(arrays(pages * page)) for pages in (1, _MANY)), strict=True)
        # Entries of a page; 0 for an array that does not grow with the positions, or not page by page.
        self._entries = [one.shape[-2] if one.by_position and _grows(one, many, page) else 0 for one, many in both]
        self.pageable = all(self._entries)
        # A ring has places for the last positions alone: a layer that has one takes single tokens.
        self.takes_chunks = all(
            entries or not one.by_position for entries, one in zip(self._entries, self._arrays, strict=True)
        )

    def bytes_held(self) -> tuple[int, int]:
        """Bytes that a page takes on each device, and those that a slot takes beside its pages."""
        page, slot = 0, 0
        for array, entries in zip(self._arrays, self._entries, strict=True):
            split = axes_size(self._mesh, tuple(axis for axis in array.dims if axis is not None))
            size = np.prod(array.shape[1:], dtype=np.int64) * np.dtype(array.dtype or self._dtype).itemsize // split
            if entries:
                page += size * entries // array.shape[-2]
            else:
                slot += size
        return int(page), int(slot)

    def empty(self, sizes: Sizes) -> Store:
        """The whole cache with nothing in it; traceable."""

        def one(array: CacheArray, entries: int) -> jax.Array:
            shape = (sizes.groups * sizes.slots, *array.shape[1:])
            if entries:
                shape = (sizes.groups * (sizes.pages + 1), *array.shape[1:-2], entries, array.shape[-1])
            zeros = jnp.zeros(shape, array.dtype or self._dtype)
            return jax.lax.with_sharding_constraint(zeros, named(self._mesh, *array.spec(self._batch)))

        return self._tree([one(*each) for each in zip(self._arrays, self._entries, strict=True)])

    def view(self, store: Store, table_Bn: jax.Array, slot_B: jax.Array | None = None) -> Any:
        """The layers' cache of some rows.

        Args:
            store: the whole cache.
            table_Bn: int32, pages of each row, in order.
            slot_B: int32, slots of the rows; None where they are all the slots.
        """

        def local(store: list[jax.Array], table_Bn: jax.Array, slot_B: jax.Array | None) -> list[jax.Array]:
            return [
                _gather_pages(array, table_Bn) if entries else array if slot_B is None else array[slot_B]
                for array, entries in zip(store, self._entries, strict=True)
            ]

        return self._tree(self._local(local, jax.tree.leaves(store), table_Bn, slot_B))

    def keep_token(
        self, store: Store, cache: Any, table_Bn: jax.Array, position_B: jax.Array, active_B: jax.Array
    ) -> Store:
        """The whole cache with one more token of each slot.

        Args:
            store: the whole cache before.
            cache: the layers' cache with the tokens in it.
            table_Bn: int32, pages of each row; those of rows that are not active are `NO_PAGE`.
            position_B: int32, positions of the tokens.
            active_B: bool, rows that have a token.
        """

        def local(
            store: list[jax.Array],
            cache: list[jax.Array],
            table_Bn: jax.Array,
            position_B: jax.Array,
            active_B: jax.Array,
        ) -> list[jax.Array]:
            return [
                _put_entry(old, new, table_Bn, position_B * entries // self._page)
                if entries
                else jnp.where(active_B.reshape(-1, *[1] * (old.ndim - 1)), new, old)
                for old, new, entries in zip(store, cache, self._entries, strict=True)
            ]

        leaves = (jax.tree.leaves(store), jax.tree.leaves(cache))
        return self._tree(self._local(local, *leaves, table_Bn, position_B, active_B))

    def keep_chunk(self, store: Store, cache: Any, pages_Bn: jax.Array, first_B: jax.Array, slot_B: jax.Array) -> Store:
        """The whole cache with the tokens of a prefill.

        Args:
            store: the whole cache before.
            cache: the layers' cache with the tokens in it.
            pages_Bn: int32, pages of the tokens; `NO_PAGE` behind the last.
            first_B: int32, number of the first of these pages in its row.
            slot_B: int32, slots of the rows; beyond the last slot for rows without tokens.
        """

        def local(
            store: list[jax.Array],
            cache: list[jax.Array],
            pages_Bn: jax.Array,
            first_B: jax.Array,
            slot_B: jax.Array,
        ) -> list[jax.Array]:
            return [
                _put_pages(old, new, pages_Bn, first_B) if entries else _put_slots(old, new, slot_B)
                for old, new, entries in zip(store, cache, self._entries, strict=True)
            ]

        leaves = (jax.tree.leaves(store), jax.tree.leaves(cache))
        return self._tree(self._local(local, *leaves, pages_Bn, first_B, slot_B))

    def by_slot(self, logits_BV: jax.Array, slot_B: jax.Array, sizes: Sizes) -> jax.Array:
        """Logits of a prefill's rows at their slots, [slots, V]; those of the other slots are 0."""

        def local(logits_BV: jax.Array, slot_B: jax.Array) -> jax.Array:
            zeros = jnp.zeros((sizes.slots, logits_BV.shape[1]), logits_BV.dtype)
            return zeros.at[slot_B].set(logits_BV, mode="drop")

        return jax.shard_map(
            local,
            mesh=self._mesh,
            in_specs=(P(self._batch), P(self._batch)),
            out_specs=P(self._batch),
            check_vma=False,
        )(logits_BV, slot_B)

    def _tree(self, leaves: list[jax.Array]) -> Any:
        return jax.tree.unflatten(self._treedef, leaves)

    def _local(self, function: Callable[..., list[jax.Array]], *args: Any) -> list[jax.Array]:
        """Apply a function to each device's part: of lists of the cache's arrays, and of arrays with a row for each row."""
        rows, specs = P(self._batch), self._specs
        in_specs = tuple(None if arg is None else specs if isinstance(arg, list) else rows for arg in args)
        return jax.shard_map(function, mesh=self._mesh, in_specs=in_specs, out_specs=specs, check_vma=False)(*args)


def _grows(one: CacheArray, many: CacheArray, page: int) -> bool:
    """Whether arrays for one page and for many have whole entries for each page."""
    return many.shape[-2] == _MANY * one.shape[-2] and page % one.shape[-2] == 0


def _gather_pages(pool_Neh: jax.Array, table_Bn: jax.Array) -> jax.Array:
    """The pages [N, ..., e, h] of each row one after the other, [B, ..., n · e, h]."""
    pages = jnp.moveaxis(pool_Neh[table_Bn], 1, -3)
    return pages.reshape(*pages.shape[:-3], -1, pages.shape[-1])


def _put_entry(pool_Neh: jax.Array, view_BCh: jax.Array, table_Bn: jax.Array, at_B: jax.Array) -> jax.Array:
    """The pool with one entry of each row written back."""
    e, rows = pool_Neh.shape[-2], jnp.arange(len(at_B), dtype=jnp.int32)
    between = (slice(None),) * (pool_Neh.ndim - 3)
    new = view_BCh[(rows, *between, at_B)]
    return pool_Neh.at[(table_Bn[rows, at_B // e], *between, at_B % e)].set(new)


def _put_pages(pool_Neh: jax.Array, view_BCh: jax.Array, pages_Bn: jax.Array, first_B: jax.Array) -> jax.Array:
    """The pool with whole pages of each row written back, from its page `first` on."""
    e, count = pool_Neh.shape[-2], pages_Bn.shape[1]
    if view_BCh.shape[-2] > count * e:
        at_BC = first_B[:, None] * e + jnp.arange(count * e, dtype=jnp.int32)[None]
        at = at_BC.reshape(len(at_BC), *[1] * (view_BCh.ndim - 3), -1, 1)
        view_BCh = jnp.take_along_axis(view_BCh, at, axis=-2)
    pages = view_BCh.reshape(*view_BCh.shape[:-2], count, e, view_BCh.shape[-1])
    return pool_Neh.at[pages_Bn].set(jnp.moveaxis(pages, -3, 1))


def _put_slots(old: jax.Array, new: jax.Array, slot_B: jax.Array) -> jax.Array:
    """The arrays of slots with those of some rows in their place; shorter ones are filled up with zeros."""
    filled = [(0, 0), *((0, most - size) for most, size in zip(old.shape[1:], new.shape[1:], strict=True))]
    return old.at[slot_B].set(jnp.pad(new, filled).astype(old.dtype), mode="drop")
