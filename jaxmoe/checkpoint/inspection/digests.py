"""Checkpoints of Orbax arrays held against the digests that they were written with."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from jaxmoe.checkpoint.boxes import whole
from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats import is_stored, open_files, read_stored, read_tensor
from jaxmoe.config import STORED, find_checkpoint


class CheckedDigests(NamedTuple):
    """The outcome of a check.

    Attributes:
        chunks: number of chunks of arrays that were read.
        files: number of other files.
        different: files whose content is not what was written.
    """

    chunks: int
    files: int
    different: tuple[str, ...]


def check_digests(path: str | os.PathLike[str]) -> CheckedDigests:
    """Read all of a checkpoint of Orbax arrays, and compare it with its digests.

    Args:
        path: directory that `jaxmoe.convert_to_orbax` made.

    Raises:
        CheckpointError: it is none, or a file of it is missing or of another size.
    """
    directory = find_checkpoint(path)
    if not is_stored(directory):
        raise CheckpointError(
            f"{directory}: digests are there of checkpoints that jaxmoe convert --to orbax wrote; this one has no {STORED}"
        )
    stored = read_stored(directory)
    different: list[str] = []
    with open_files(stored.checkpoint.files) as descriptors:
        for chunk, digest in stored.digests:
            values, _ = read_tensor(descriptors, chunk, whole(chunk.shape))
            if hashlib.sha256(values.reshape(-1).view("uint8").data).hexdigest() != digest:
                different.append(str(chunk.file))
    beside = stored.description.get("files", {})
    for name, digest in beside.items():
        file = directory / Path(name).name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            different.append(str(file))
    return CheckedDigests(len(stored.digests), len(beside), tuple(different))
