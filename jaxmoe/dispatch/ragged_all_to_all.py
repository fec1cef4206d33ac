"""Ragged all-to-all dispatch: the exchange in bounded rounds without padding on the wire. GPU only.

`jax.lax.ragged_all_to_all` sends the used places of a buffer alone. Buffers have the sizes that `all_to_all` gives
them, so the workspace is fixed at compile time here too, and device i writes to place i·C of every receiver.

Where XLA's ways of doing it are known to break it is refused. With more than 32 ranks its one-shot kernel writes beyond the
32 places of its barrier, and the devices fail with an illegal address (openxla/xla, "RaggedAllToAll one-shot path crashes
with CUDA_ERROR_ILLEGAL_ADDRESS above 32 ranks"). Its kernel that the device itself starts, which a flag asks for, fails a
check in every run of several processes ("Device-initiated ragged-all-to-all crashes ... on any multi-process run").

"auto" does not choose it: XLA carries it out differently by the number of ranks (one kernel up to 8, NCCL beyond), and what
is modeled of `all_to_all` is not known of it.
"""

import os
from functools import partial

import jax
import jax.numpy as jnp

from jaxmoe.dispatch.base import Dispatch, DispatchLayout, DispatchShape
from jaxmoe.dispatch.collectives import Collective
from jaxmoe.dispatch.exchange import (
    Transfer,
    exchange_collectives,
    exchange_memory_bytes,
    exchange_workspace_bytes,
    run_exchange,
    token_axes,
)

# Ranks that the barrier of XLA's kernel has room for, and the flag that asks for another kernel.
MOST_RANKS = 32
DEVICE_KERNEL = "--xla_gpu_experimental_ragged_all_to_all_use_device_kernel"


def breaks(layout: DispatchLayout, processes: int) -> str:
    """The reason not to run on a mesh, and the way out; see `Dispatch.breaks`."""
    if layout.num_devices > MOST_RANKS:
        return (
            f"XLA's kernel for it has room for {MOST_RANKS} ranks, and writes beyond it with {layout.num_devices}, here "
            f"along {' and '.join(layout.expert_axes)}: use 'all_to_all', or expert_axes of at most {MOST_RANKS} devices"
        )
    if processes > 1 and _device_kernel():
        return (
            f"XLA's kernel that {DEVICE_KERNEL} asks for crashes in a run of several processes, here {processes}: leave the "
            "flag out of XLA_FLAGS, or use 'all_to_all'"
        )
    return ""


def _device_kernel() -> bool:
    """Whether XLA's flag asks for the kernel that devices start; the last word of several counts."""
    said = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.partition("=")[0] == DEVICE_KERNEL]
    return bool(said) and said[-1].partition("=")[2].lower() not in ("false", "0")


def open_transfers(sizes_n: jax.Array, C: int, layout: DispatchLayout) -> tuple[Transfer, Transfer]:
    """Only used places are exchanged; the way back takes what came, to where it came from."""
    axes = layout.expert_axes
    received_n = jax.lax.all_to_all(sizes_n, axes, split_axis=0, concat_axis=0, tiled=True)
    blocks_n = jnp.arange(layout.num_devices, dtype=jnp.int32) * C
    mine_n = jnp.full(layout.num_devices, jax.lax.axis_index(axes) * C, jnp.int32)

    def transfer(send_n: jax.Array, receive_n: jax.Array) -> Transfer:
        def send(rows: jax.Array) -> jax.Array:
            # Zeros, not an empty buffer: places that nothing is written to stay as they are here.
            return jax.lax.ragged_all_to_all(
                rows, jnp.zeros_like(rows), blocks_n, send_n, mine_n, receive_n, axis_name=axes
            )

        return send

    return transfer(sizes_n, received_n), transfer(received_n, sizes_n)


def collectives(shape: DispatchShape) -> tuple[Collective, ...]:
    """Those of the exchange, and the number of rows that each device is about to send."""
    n, axes = shape.layout.num_devices, shape.layout.expert_axes
    sizes = Collective(op="all-to-all", axes=axes, devices=n, bytes=4 * n, payload=None)
    return (sizes, *exchange_collectives("ragged-all-to-all", shape))


RAGGED_ALL_TO_ALL = Dispatch(
    name="ragged_all_to_all",
    token_axes=token_axes,
    run=partial(run_exchange, open_transfers),
    collectives=collectives,
    memory_bytes=exchange_memory_bytes,
    workspace_bytes=exchange_workspace_bytes,
    cannot_run={"cpu": "XLA has no ragged_all_to_all for CPU devices; all_to_all runs everywhere"},
    breaks=breaks,
    auto=False,
)
