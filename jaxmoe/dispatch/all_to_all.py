"""All-to-all dispatch: every token once to each device with one of its experts, in bounded rounds. Runs everywhere."""

from functools import partial

import jax

from jaxmoe.dispatch.base import Dispatch, DispatchLayout
from jaxmoe.dispatch.exchange import (
    Transfer,
    exchange_collectives,
    exchange_memory_bytes,
    exchange_workspace_bytes,
    run_exchange,
    token_axes,
)


def open_transfers(sizes_n: jax.Array, C: int, layout: DispatchLayout) -> tuple[Transfer, Transfer]:
    """Whole buffers are exchanged, used places or not; there and back are the same."""

    def transfer(rows: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(rows, layout.expert_axes, split_axis=0, concat_axis=0, tiled=True)

    return transfer, transfer


ALL_TO_ALL = Dispatch(
    name="all_to_all",
    token_axes=token_axes,
    run=partial(run_exchange, open_transfers),
    collectives=partial(exchange_collectives, "all-to-all"),
    memory_bytes=exchange_memory_bytes,
    workspace_bytes=exchange_workspace_bytes,
)
