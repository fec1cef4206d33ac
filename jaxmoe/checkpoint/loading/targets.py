"""The places where a shard is put together: host memory, or piece by piece its devices.

Each target counts the elements that arrive. When the last one has, it hands its arrays over and lets go of its memory.
All methods may be called from several threads.
"""

import functools
import threading
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.checkpoint.boxes import Box, is_contiguous, volume
from jaxmoe.checkpoint.loading.buffers import Scratch, aligned_array
from jaxmoe.checkpoint.loading.plan import Shard
from jaxmoe.layers.in_place import update_slice


class Target(Protocol):
    """A shard being filled."""

    arrays: list[jax.Array] | None
    """One array per device of the shard, once it is complete."""

    def window(self, box: Box, dtype: np.dtype) -> np.ndarray | None:
        """Memory of the shard that bytes of `dtype` for `box` may be read straight into, if there is such.

        The caller then says `arrived` instead of `write`.
        """

    def arrived(self, box: Box) -> None:
        """Say that the `window` of `box` has been filled."""

    def write(self, box: Box, values: np.ndarray, scratch: Scratch) -> None:
        """Put `values`, of the shape of `box`, into the shard, cast to its dtype; `scratch` may be overwritten."""


class HostTarget:
    """Puts a shard together in host memory and hands it to its devices whole.

    On CPU devices the memory becomes the array, and replicas share it. That is safe: JAX treats memory it was handed
    this way as read-only, and copies where a donated array of that kind would be written to.
    """

    def __init__(self, shard: Shard) -> None:
        self.arrays: list[jax.Array] | None = None
        self._shard = shard
        self._missing = shard.filled
        self._memory: np.ndarray | None = None
        self._lock = threading.Lock()
        if not shard.filled:
            self._hand_over(self._get_memory())

    def window(self, box: Box, dtype: np.dtype) -> np.ndarray | None:
        """See `Target`."""
        if dtype != self._shard.spec.dtype or not is_contiguous(box, self._shard.shape):
            return None
        return self._get_memory()[_slices(box)]

    def arrived(self, box: Box) -> None:
        """See `Target`."""
        with self._lock:
            self._missing -= volume(box)
            complete = self._missing == 0
        if complete:
            self._hand_over(self._get_memory())

    def write(self, box: Box, values: np.ndarray, scratch: Scratch) -> None:
        """See `Target`."""
        del scratch
        np.copyto(self._get_memory()[_slices(box)], values, casting="unsafe")
        self.arrived(box)

    def _get_memory(self) -> np.ndarray:
        # Made when first needed, so that shards that wait for their turn take no memory.
        with self._lock:
            if self._memory is None:
                self._memory = aligned_array(
                    self._shard.shape, self._shard.spec.dtype, zeros=self._shard.filled < volume(self._shard.box)
                )
            return self._memory

    def _hand_over(self, memory: np.ndarray) -> None:
        self._memory = None
        devices = list(self._shard.devices)
        self.arrays = jax.device_put([memory] * len(devices), devices)
        # An accelerator reads `memory` until then; waiting bounds how much of it is alive.
        jax.block_until_ready(self.arrays)


class DeviceTarget:
    """Puts a shard together on its devices from pieces, so that the host never holds all of it."""

    def __init__(self, shard: Shard) -> None:
        self.arrays: list[jax.Array] | None = None
        self._shard = shard
        self._missing = shard.filled
        self._partial: list[jax.Array] | None = None
        self._lock = threading.Lock()
        if not shard.filled:
            self.arrays = self._zeros()

    def window(self, box: Box, dtype: np.dtype) -> np.ndarray | None:
        """See `Target`."""
        del box, dtype
        return None

    def arrived(self, box: Box) -> None:
        """See `Target`."""
        raise AssertionError("a shard on a device has no window")

    def write(self, box: Box, values: np.ndarray, scratch: Scratch) -> None:
        """See `Target`."""
        piece = values
        if values.dtype != self._shard.spec.dtype or not values.flags.c_contiguous:
            piece = scratch.array(values.shape, self._shard.spec.dtype)
            np.copyto(piece, values, casting="unsafe")
        corner = np.array([start for start, _ in box], np.int32)
        pieces = [jax.device_put(piece, device) for device in self._shard.devices]
        # The caller uses the memory of `piece` again, so the transfers have to be over.
        jax.block_until_ready(pieces)
        with self._lock:
            partial = self._zeros() if self._partial is None else self._partial
            self._partial = [_insert(whole, part, corner) for whole, part in zip(partial, pieces, strict=True)]
            if any(device.platform == "cpu" for device in self._shard.devices):
                # There was no transfer: the insertion itself reads the caller's memory.
                jax.block_until_ready(self._partial)
            self._missing -= volume(box)
            if not self._missing:
                self.arrays, self._partial = self._partial, None

    def _zeros(self) -> list[jax.Array]:
        spec = self._shard.spec
        return [jnp.zeros(self._shard.shape, spec.dtype, device=device) for device in self._shard.devices]


@functools.partial(jax.jit, donate_argnums=0)
def _insert(whole: jax.Array, piece: jax.Array, corner: jax.Array) -> jax.Array:
    """`whole` with `piece` at `corner`, in the memory of `whole`."""
    return update_slice(whole, piece, tuple([corner[dim] for dim in range(whole.ndim)]))


def _slices(box: Box) -> tuple[Any, ...]:
    # With the ellipsis a scalar gives a view as well, and not its value.
    return (*[slice(start, stop) for start, stop in box], ...)
