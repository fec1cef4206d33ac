"""The room for an engine: its sizes, from what is asked for and what the devices have left."""

import math

import jax
from flax import nnx

from jaxmoe.checks import integer
from jaxmoe.generation.continuous.layout import CacheLayout
from jaxmoe.generation.continuous.sizes import Sizes, make_sizes
from jaxmoe.mesh import bytes_left
from jaxmoe.models import Decoder

# Bytes of a device's memory for pages, where the device does not say how much it has.
DEFAULT_BYTES = 2**30
# Share of the memory that a device has left for pages; the rest is for what programs need while they run.
SHARE_OF_MEMORY = 0.7


def plan_sizes(
    model: Decoder,
    *,
    num_slots: int | None,
    page_size: int,
    num_pages: int | None,
    prefill_chunk: int,
    max_length: int | None,
) -> tuple[Sizes, CacheLayout]:
    """Work out the sizes of an engine, and the layout of its cache; arguments and errors are those of `ContinuousEngine`."""
    page_size = integer("page_size", page_size, least=1)
    prefill_chunk = integer("prefill_chunk", prefill_chunk, least=1)
    most = model.config.max_position_embeddings
    max_length = most if max_length is None else integer("max_length", max_length, least=2, most=most)
    layout = CacheLayout(model, page_size, -(-max_length // page_size) * page_size)
    groups = layout.groups
    slots = 16 if num_slots is None else -(-integer("num_slots", num_slots, least=1) // groups)
    page_bytes, slot_bytes = layout.bytes_held()
    most_pages = slots * -(-max_length // page_size)
    if num_pages is None:
        room = _free_bytes(model) - slots * slot_bytes
        num_pages = min(most_pages, _coarse(int(room // page_bytes) - 1) if page_bytes else most_pages)
        if num_pages < 1:
            raise ValueError(
                f"a device has room for at least one page; {slots} slots of {slot_bytes} bytes and pages of {page_bytes} "
                f"bytes leave none of the {_free_bytes(model)} bytes that are free; ask for fewer num_slots"
            )
    sizes = make_sizes(
        groups=groups,
        slots=slots,
        page=page_size,
        pages=integer("num_pages", num_pages, least=1),
        chunk=prefill_chunk,
        rows=4,
        max_length=max_length,
        goes_on=layout.takes_chunks,
        shares=layout.pageable,
    )
    return sizes, layout


def _coarse(pages: int) -> int:
    """Leave out up to one page of 32, so that some bytes more or less that are free make no other programs."""
    return pages - pages % (1 << max(pages.bit_length() - 6, 0)) if pages > 0 else pages


def _free_bytes(model: Decoder) -> int:
    """Bytes for the cache on the device that has the least, once the weights are there."""
    leaves = jax.tree.leaves(nnx.state(model))
    coming = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in leaves
        if isinstance(leaf, jax.ShapeDtypeStruct)
    )
    known = [left for device in model.mesh.local_devices if (left := bytes_left(device)) is not None]
    return int(SHARE_OF_MEMORY * (min(known) - coming)) if known else DEFAULT_BYTES
