"""Copies that the blocks of a cluster share, in Mosaic GPU's interpreter as on a GPU.

The interpreter has each block copy everything by itself. Here each of two blocks copies one half, into its own shared memory
and into its neighbor's, and a barrier has its arrival when both halves are there. So a block that loads when its neighbor
still reads spoils what that reads, and one that ends early has its memory written to when it is gone.
"""

import dataclasses
import threading
import time
from collections import Counter

import numpy as np

# Seconds that one block's warpgroups wait before they read what has come, so that the other gets ahead if it can.
LATE = 0.02
# Seconds until the neighbor has its memory; blocks on a GPU wait for each other when they begin.
BEGIN = 60


class Multicast:
    """The interpreter, changed by `monkeypatch`, with shared copies to arrays of so many rows.

    Attributes:
        halves: number of halves that were copied, by block that has them and block that they were read by.
    """

    def __init__(self, monkeypatch, rows: int, late_block: int):
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory

        self.rows, self.halves = rows, Counter()
        self.lock, self.pending, self.begun = threading.Lock(), Counter(), set()
        self.memories = []  # kept, so that each has an id of its own
        multicast, wait = self, shared_memory.Barrier.wait

        class Task(gpu_callbacks.AsyncCopyGmemToSmemTask):
            def __init__(self, **arguments):
                super().__init__(**arguments)
                self.barrier_key = arguments["barrier_allocation_key"]

            def __call__(self, tma_thread_id):
                memory = gpu_callbacks._get_shared_memory()
                if memory.buffer_shape_and_dtype(self.dst_allocation_key).shape[-2] == rows:
                    multicast.copy(memory, self)
                else:
                    super().__call__(tma_thread_id)

        def wait_and_be_late(barrier, thread, *arguments, **options):
            wait(barrier, thread, *arguments, **options)
            if thread.block_id == late_block:
                time.sleep(LATE)

        monkeypatch.setattr(gpu_callbacks, "AsyncCopyGmemToSmemTask", Task)
        monkeypatch.setattr(shared_memory.Barrier, "wait", wait_and_be_late)

    def copy(self, memory, task) -> None:
        """Copy the half that is its block's to both blocks."""
        block, height = task.dst_allocation_key.block_id, self.rows // 2
        options = {"logging_info": task.logging_info}
        read, (_, dtype), _ = memory.get_buffer_content(
            task.src_allocation_key, task.src_access, task.thread, **options
        )
        values = np.zeros(task.src_access.shape, dtype)
        if read is not None:  # zeros beyond the end
            values[tuple(slice(size) for size in read.shape)] = read
        own = slice(block * height, (block + 1) * height)
        for target in (0, 1):
            key, barrier = (
                dataclasses.replace(key, block_id=target) for key in (task.dst_allocation_key, task.barrier_key)
            )
            self.wait_until_there(memory, key, barrier)
            with self.lock:
                old, *_ = memory.get_buffer_content(key, task.dst_access, task.thread, **options)
                new = np.array(old)
                new[..., own, :] = values[..., own, :]
                memory.store_buffer_content(key, task.dst_access, new, task.thread, **options)
                self.halves[target, block] += 1
                place = (target, barrier.buffer_id)
                self.pending[place] += 1
                complete = self.pending[place] == 2
                if complete:
                    self.pending[place] = 0
            if complete:
                memory.get_barrier(barrier).arrive(task.thread, None, task.logging_info)

    def wait_until_there(self, memory, key, barrier) -> None:
        """Wait for the neighbor to begin; once it has, its memory is there or it has ended too early."""
        array = (id(memory), key.block_id, key.buffer_id)
        until = time.monotonic() + (0 if array in self.begun else BEGIN)
        while True:
            try:
                memory.buffer_shape_and_dtype(key)
                memory.get_barrier(barrier)
                self.begun.add(array)
                self.memories.append(memory)
                return
            except KeyError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
