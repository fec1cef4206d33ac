"""Carrying out a load plan: threads read, shards fill up, arrays appear on the mesh."""

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_shape, split, volume
from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import is_float, open_files, read_box
from jaxmoe.checkpoint.loading.buffers import Scratch
from jaxmoe.checkpoint.loading.delivery import Delivery, deliver
from jaxmoe.checkpoint.loading.plan import LoadPlan, Read, Shard
from jaxmoe.checkpoint.loading.report import LoadReport
from jaxmoe.checkpoint.loading.targets import DeviceTarget, HostTarget, Target
from jaxmoe.checkpoint.loading.threads import run_in_threads
from jaxmoe.checkpoint.lora import TensorDelta

STAGING_BYTES = 256 * 2**20
_MAX_CHUNK_BYTES = 4 * 2**20
# A thread holds what it read, the same cast (twice the bytes at worst), and as much again inside a transfer; shards
# that are put whole take another chunk per thread. Adding an adapter's update takes as much, before there is a cast.
_CHUNKS_PER_THREAD = 8


def load_arrays(
    plan: LoadPlan,
    *,
    threads: int | None = None,
    staging: bool | None = None,
    staging_bytes: int = STAGING_BYTES,
    check_finite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    placed: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, jax.Array], LoadReport]:
    """Read what a plan says and put it on the mesh.

    Args:
        plan: plan from `make_load_plan`, made for all devices of this process.
        threads: number of threads that read; by default one per core, at least 2 and at most 8.
        staging: False reads into the memory that becomes the arrays, which needs CPU devices to be quick; True goes
            through reused staging memory, and puts large shards together on their device. None chooses by device.
        staging_bytes: most host memory that staging takes.
        check_finite: whether tensors that hold infinities or NaNs are refused.
        progress: function that is called with (bytes done, bytes in all), by one thread at a time but not by the
            caller's.
        placed: function that is called likewise with (device id, bytes that a shard on it was given); zeros that no tensor
            fills are there from the start.

    Returns:
        {path: array of the spec's shape, dtype and sharding}, and the report.

    Raises:
        CheckpointError: a file changed since the plan was made, ended early or could not be read; or, with
            `check_finite`, a tensor is not finite. Nothing stays behind: no thread, no file, no array.
    """
    start = time.perf_counter()
    shards, bytes_read = load_shards(
        plan,
        threads=threads,
        staging=staging,
        staging_bytes=staging_bytes,
        check_finite=check_finite,
        progress=progress,
        placed=placed,
    )
    parts: dict[str, list[jax.Array]] = {spec.path: [] for spec in plan.specs}
    for shard, arrays in zip(plan.shards, shards, strict=True):
        parts[shard.spec.path] += arrays
    result: dict[str, jax.Array] = {
        spec.path: jax.make_array_from_single_device_arrays(
            spec.shape, spec.sharding, parts[spec.path], dtype=spec.dtype
        )
        for spec in plan.specs
    }
    report = LoadReport(
        bytes_read=bytes_read,
        bytes_needed=plan.bytes_needed,
        seconds=time.perf_counter() - start,
        tensors_read=len({read.tensor.name for read in plan.reads}),
        bytes_per_device=plan.bytes_per_device,
        expert_bytes_per_device=plan.expert_bytes_per_device,
        ignored=plan.ignored,
        adapter=plan.adapter,
    )
    return result, report


def load_shards(
    plan: LoadPlan,
    *,
    threads: int | None = None,
    staging: bool | None = None,
    staging_bytes: int = STAGING_BYTES,
    check_finite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    placed: Callable[[int, int], None] | None = None,
) -> tuple[list[list[jax.Array]], int]:
    """`load_arrays` for a plan of any devices: the arrays of each of `plan.shards`, and the bytes read."""
    if threads is None:
        threads = min(8, max(2, os.cpu_count() or 2))
    if threads < 1:
        raise ValueError(f"reading takes at least one thread; got threads={threads}")
    if staging is None:
        staging = any(device.platform != "cpu" for shard in plan.shards for device in shard.devices)
    chunk_bytes = min(_MAX_CHUNK_BYTES, staging_bytes // (threads * _CHUNKS_PER_THREAD))
    if chunk_bytes < 1:
        raise ValueError(f"staging needs some memory per thread; got staging_bytes={staging_bytes}, threads={threads}")
    targets = _make_targets(plan, whole_up_to=chunk_bytes if staging else None)
    with open_files(plan.files) as descriptors:
        tally = _Tally(plan, progress, placed)
        worker = _Worker(descriptors, targets, plan.deltas, tally, check_finite)
        run_in_threads(worker, _chunks(_reading_order(plan, staging), chunk_bytes), threads)
    arrays = []
    for target in targets:
        assert target.arrays is not None, "a shard is incomplete though every read of the plan was done"
        arrays.append(target.arrays)
    return jax.block_until_ready(arrays), tally.done


def _make_targets(plan: LoadPlan, whole_up_to: int | None) -> list[Target]:
    """One target per shard; a parameter with more than `whole_up_to` local bytes is put together on its devices."""
    local_bytes: Counter[str] = Counter()
    for shard in plan.shards:
        local_bytes[shard.spec.path] += shard.nbytes
    return [
        HostTarget(shard) if whole_up_to is None or local_bytes[shard.spec.path] <= whole_up_to else DeviceTarget(shard)
        for shard in plan.shards
    ]


def _reading_order(plan: LoadPlan, staging: bool) -> Sequence[Read]:
    """The plan's order, that of the files; under staging one parameter after the other.

    That way few shards are incomplete at any time, which is what bounds the memory of those that are put whole.
    """
    if not staging:
        return plan.reads
    place = {spec.path: index for index, spec in enumerate(plan.specs)}
    param = [place[shard.spec.path] for shard in plan.shards]
    return sorted(plan.reads, key=lambda read: min(param[copy.shard] for copy in read.copies))


def _chunks(reads: Iterable[Read], chunk_bytes: int) -> Iterator[tuple[Read, Box]]:
    """The boxes to read one at a time, each of at most `chunk_bytes` where an element is no larger."""
    for read in reads:
        assert read.tensor.dtype is not None
        for box in split(read.box, max(1, chunk_bytes // read.tensor.dtype.itemsize)):
            yield read, box


class _Tally:
    """Counts bytes for all threads and tells the caller."""

    def __init__(
        self,
        plan: LoadPlan,
        progress: Callable[[int, int], None] | None,
        placed: Callable[[int, int], None] | None,
    ) -> None:
        self.done = 0
        self._total = plan.bytes_needed
        self._shards = plan.shards
        self._progress = progress
        self._placed = placed
        self._lock = threading.Lock()
        self.add(0)
        if placed is not None:
            for shard in plan.shards:
                _place(placed, shard, volume(shard.box) - shard.filled)

    def add(self, count: int, deliveries: Iterable[Delivery] = ()) -> None:
        with self._lock:
            self.done += count
            if self._placed is not None:
                for delivery in deliveries:
                    _place(self._placed, self._shards[delivery.shard], volume(delivery.shard_box))
            if self._progress is not None:
                self._progress(min(self.done, self._total), self._total)  # scales may be read twice


def _place(placed: Callable[[int, int], None], shard: Shard, elements: int) -> None:
    for device in shard.devices:
        placed(device.id, elements * shard.spec.dtype.itemsize)


class _Worker:
    """Reads one chunk and delivers it to every shard that wants some of it."""

    def __init__(
        self,
        descriptors: dict[Path, int],
        targets: Sequence[Target],
        deltas: Mapping[str, TensorDelta],
        tally: _Tally,
        check_finite: bool,
    ) -> None:
        self._descriptors = descriptors
        self._targets = targets
        self._deltas = deltas
        self._tally = tally
        self._check_finite = check_finite
        self._own = threading.local()

    def __call__(self, chunk: tuple[Read, Box]) -> None:
        read, box = chunk
        tensor, dtype = read.tensor, read.tensor.dtype
        assert dtype is not None
        if not hasattr(self._own, "read"):
            self._own.read, self._own.cast = Scratch(), Scratch()
        deliveries = [delivery for copy in read.copies if (delivery := deliver(copy, box)) is not None]
        delta = self._deltas[tensor.name].of(box) if tensor.name in self._deltas else None

        # Where one shard takes the chunk as it is on disk, it is read to its place and others copy from there.
        values, direct = None, None
        for delivery in deliveries if delta is None else ():
            if delivery.in_order and delivery.part == box:
                values = self._targets[delivery.shard].window(delivery.shard_box, dtype)
                if values is not None:
                    values, direct = values.reshape(box_shape(box)), delivery
                    break
        if values is None:
            values = self._own.read.array(box_shape(box), dtype)
        count = read_box(self._descriptors, tensor, box, values)
        if self._check_finite and is_float(dtype) and not np.isfinite(values).all():
            raise CheckpointError(
                f"{tensor.file}: check_finite refuses infinities and NaNs, and tensor {tensor.name!r} holds some; "
                "load without check_finite to look at it, or get the checkpoint again"
            )
        if delta is not None:
            delta += values
            values = delta
            if self._check_finite and not np.isfinite(values).all():
                raise CheckpointError(
                    f"check_finite refuses infinities and NaNs, and tensor {tensor.name!r} has some once the adapter is "
                    "merged; load without the adapter, or get it again"
                )
        for delivery in deliveries:
            target = self._targets[delivery.shard]
            if delivery is direct:
                continue
            target.write(delivery.shard_box, delivery.take(values, box), self._own.cast)
        # Last, because a complete shard is handed over, and `values` is its memory.
        if direct is not None:
            self._targets[direct.shard].arrived(direct.shard_box)
        self._tally.add(count, deliveries)
