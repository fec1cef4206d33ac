"""Reading boxes of tensors from open files: positioned reads of exactly the bytes of a box."""

import itertools
import math
import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_shape, contiguous_suffix
from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats.decoded import DecodedTensor, inverse
from jaxmoe.checkpoint.formats.files import CheckpointFile
from jaxmoe.checkpoint.formats.safetensors import TensorInfo

_OTHER_FILES = 128  # that a process has open besides: its libraries, pipes, a server's connections


@contextmanager
def open_files(files: Sequence[CheckpointFile]) -> Iterator[dict[Path, int]]:
    """Open `files` for reading: path -> file descriptor, closed on the way out.

    Where there are more of them than the process may have open, its limit is raised as far as the system lets it.

    Raises:
        CheckpointError: a file is not what it was when its header was read, or there are more than the system allows.
        FileNotFoundError: a file is gone.
    """
    descriptors: dict[Path, int] = {}
    _make_room(len(files))
    try:
        for file in files:
            descriptors[file.path] = descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(
                    f"{file.path}: a file must not change between planning and loading; it had {file.size} bytes and "
                    f"has {status.st_size}, or was written to since; plan again"
                )
        yield descriptors
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _make_room(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise CheckpointError(
            f"the files of a checkpoint are open while it is read; it has {count}, and this process may have {hard} open; "
            "raise the limit (ulimit -Hn) and run again"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def read_tensor(descriptors: Mapping[Path, int], tensor: TensorInfo, box: Box) -> tuple[np.ndarray, int]:
    """Read a region of a tensor, in the order of its dims however it is stored; the values, and the bytes read."""
    assert tensor.dtype is not None
    order = tensor.dim_order
    stored = box if order is None else tuple([box[dim] for dim in order])
    values = np.empty(box_shape(stored), tensor.dtype)
    count = read_box(descriptors, tensor.as_stored(), stored, values)
    return values if order is None else values.transpose(inverse(order)), count


def read_box(descriptors: Mapping[Path, int], tensor: TensorInfo, box: Box, into: np.ndarray) -> int:
    """Read a box of a tensor, one positioned read per run of neighboring bytes and nothing between the runs.

    Of a `DecodedTensor` the boxes of its parts are read so, and decoded.

    Args:
        descriptors: file descriptors by path, from `open_files`.
        tensor: tensor to read, its dims in the order of the file.
        box: box of it.
        into: contiguous memory of the box's size, of any dtype, that receives the elements in row-major order; for a
            `DecodedTensor` of the floating dtype that its values are to have.

    Returns:
        Bytes that the system said it read.

    Raises:
        CheckpointError: the file ends before the tensor does, or cannot be read.
        QuantizationError: a scale is zero or not finite.
    """
    if isinstance(tensor, DecodedTensor):
        parts = {
            role: read_tensor(descriptors, tensor.parts[role], part) for role, part in tensor.stored_boxes(box).items()
        }
        tensor.decode({role: values for role, (values, _) in parts.items()}, box, into.reshape(box_shape(box)))
        return sum(count for _, count in parts.values())
    descriptor = descriptors[tensor.file]
    memory = memoryview(into.reshape(-1).view(np.uint8).data)
    assert tensor.dtype is not None
    run_bytes, first, steps = _runs(tensor.shape, tensor.dtype.itemsize, box)
    read = 0
    try:
        for step in itertools.product(*steps):
            offset = tensor.offset + first + sum(step)
            end = read + run_bytes
            while read < end:
                count = os.preadv(descriptor, [memory[read:end]], offset)
                if count == 0:
                    raise CheckpointError(
                        f"{tensor.file}: the file ended at byte {offset}, inside tensor {tensor.name!r}; it was cut "
                        "while being read; load again once it is whole"
                    )
                read += count
                offset += count
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} could not be read: {error}") from error
    return read


# Alike tensors are read in alike boxes: all experts of a checkpoint in a few.
@lru_cache(maxsize=4096)
def _runs(shape: tuple[int, ...], itemsize: int, box: Box) -> tuple[int, int, list[range]]:
    """Bytes of each contiguous run of `box`, the place of the first in the tensor, and steps from it to all of them."""
    strides = [math.prod(shape[dim + 1 :]) * itemsize for dim in range(len(shape))]
    corner = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    # One run takes the range of the last partial dim and everything inside it.
    outer = max(contiguous_suffix(box, shape) - 1, 0)
    sizes = box_shape(box)
    steps = [range(0, size * stride, stride) for size, stride in zip(sizes[:outer], strides[:outer], strict=True)]
    return math.prod(sizes[outer:]) * itemsize, corner, steps
