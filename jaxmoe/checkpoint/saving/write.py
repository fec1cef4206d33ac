"""Writing safetensors files and their index: one tensor in memory at a time.

The safetensors library writes a file of tensors that are all in host memory: 1024 MiB for a file of 1 GiB, where this
takes the 32 MiB of its largest tensor. The tests hold that both write the same bytes, and the library reads the header of
every file before the checkpoint gets its name.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import ELEMENT_TYPES, SAFETENSORS
from jaxmoe.checkpoint.saving.outputs import OutputTensor

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of a size as transformers takes it: a number, or "5GB", "500MB", "2GiB".

    Raises:
        ValueError: it is no such size, or not above 0.

    Example:
        >>> parse_size("5GB")
        5000000000
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]B|[KMG]IB|)\s*", str(size).upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if count < 1:
        raise ValueError(
            f'max_shard_size is a number of bytes above 0, or one with a unit as "5GB" or "2GiB"; got {size!r}'
        )
    return count


def divide_into_files(tensors: Iterable[OutputTensor], max_bytes: int) -> dict[str, list[OutputTensor]]:
    """Deal tensors out to files of at most `max_bytes` of data, in their order; a larger tensor gets its own file.

    Returns:
        File name -> tensors: ``model.safetensors``, or ``model-00001-of-00003.safetensors`` and so on.
    """
    files: list[list[OutputTensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if tensor.nbytes > room and files[-1]:
            files.append([])
            room = max_bytes
        files[-1].append(tensor)
        room -= tensor.nbytes
    if len(files) == 1:
        return {SAFETENSORS.single: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": part for i, part in enumerate(files, 1)}


def write_files(
    directory: Path,
    files: dict[str, list[OutputTensor]],
    on_bytes: Callable[[int, int], None] | None = None,
) -> None:
    """Write the files of a checkpoint and, where there are several, their index.

    Args:
        directory: directory for them, which exists.
        files: files from `divide_into_files`.
        on_bytes: function that is called with (bytes done, bytes in all).

    Raises:
        CheckpointError: the safetensors library does not find in a file what was written to it.
    """
    everything = [tensor for part in files.values() for tensor in part]
    total, done = sum(tensor.nbytes for tensor in everything), 0
    for name, part in files.items():
        for count in _write_file(directory / name, part):
            done += count
            if on_bytes is not None:
                on_bytes(done, total)
        check_written(directory / name, part)
    if len(files) > 1:
        index = {
            "metadata": {
                "total_size": total,
                "total_parameters": sum(math.prod(tensor.shape) for tensor in everything),
            },
            "weight_map": {tensor.name: name for name, part in sorted(files.items()) for tensor in part},
        }
        (directory / SAFETENSORS.index).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_written(path: Path, tensors: Sequence[OutputTensor]) -> None:
    """Let the safetensors library read the header of a file, which knows nothing of how it was written.

    Raises:
        CheckpointError: it does not find the tensors.
    """
    expected = {tensor.name: list(tensor.shape) for tensor in tensors}
    try:
        with safe_open(path, framework="numpy") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        problem = "" if found == expected else f"it finds {len(found)} tensors of {len(expected)}, or other shapes"
    except (SafetensorError, OSError) as error:
        problem = str(error)
    if problem:
        raise CheckpointError(
            f"{path}: the safetensors library does not find what was written: {problem}; is the disk full or failing?"
        )


def _write_file(path: Path, tensors: Sequence[OutputTensor]) -> Iterable[int]:
    """Write one file; gives the bytes of each tensor once it is written."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    offset = 0
    # Wide elements first, so that all are aligned, as the reference writer has it.
    for tensor in sorted(tensors, key=lambda tensor: -ELEMENT_TYPES[tensor.dtype_name].bits):
        places[tensor.name] = offset
        offsets = [offset, offset := offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype_name, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        # In their own order: those that are made together, such as codes and scales, are then in memory together.
        for tensor in tensors:
            file.seek(start + places[tensor.name])
            data = np.ascontiguousarray(tensor.values()).reshape(-1).view(np.uint8)
            assert data.nbytes == tensor.nbytes, f"{tensor.name}: {data.nbytes} bytes instead of {tensor.nbytes}"
            file.write(data.data)
            del data
            yield tensor.nbytes
        # On the disk before the directory gets its name: no crash leaves a whole-looking file with holes.
        file.flush()
        os.fsync(file.fileno())
