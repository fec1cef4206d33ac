"""Arrays of an Orbax checkpoint, written chunk by chunk: what is there after an interruption is not written again.

TensorStore writes the chunks. Orbax writes what makes a folder of arrays a checkpoint, its tree, and does so last: before
that no reader takes the folder for one. A log beside the folder has a line for each chunk that is on the disk.
"""

import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxmoe.checkpoint.boxes import Box
from jaxmoe.checkpoint.formats import WEIGHTS, StoredArray
from jaxmoe.config import CONVERTING

_TREE = "tree"


class ChunkLog:
    """The chunks of a conversion that are written, in a file that outlives the process.

    Its first line says what is converted. One process has it at a time.

    Args:
        directory: directory that is written to, which exists.
        job: description of the conversion. A log of another one is begun anew, with all that it is about removed.

    Raises:
        BlockingIOError: another process writes to the directory.
    """

    def __init__(self, directory: Path, job: Mapping[str, Any]) -> None:
        self.digests: dict[tuple[str, int], str] = {}
        self._directory = directory
        self._path = directory / CONVERTING
        self._file: IO[bytes] = open(self._path, "ab+")  # noqa: SIM115 - held, and locked, until `close`
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise BlockingIOError(
                f"one process at a time converts to a directory, and another one is writing to {directory}; wait for it"
            ) from error
        self._begin(json.dumps(job, sort_keys=True))

    def _begin(self, job: str) -> None:
        self._file.seek(0)
        # A line without its end was being written when the process was killed.
        lines = [line for line in self._file.read().splitlines(keepends=True) if line.endswith(b"\n")]
        known = bool(lines) and lines[0].decode().rstrip("\n") == job
        for line in lines[1:] if known else ():
            path, start, digest = json.loads(line)
            self.digests[path, start] = digest
        for other in self._directory.iterdir():
            if other.name != CONVERTING and (not known or other.name != WEIGHTS):
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        self._file.truncate(sum(map(len, lines)) if known else 0)
        if not known:
            self._write(job + "\n")

    def add(self, path: str, start: int, digest: str) -> None:
        """Note a chunk that is on the disk."""
        self.digests[path, start] = digest
        self._write(json.dumps([path, start, digest]) + "\n")

    def finish(self) -> None:
        """Remove the log: all that it stands for is there."""
        self._path.unlink()
        self.close()

    def close(self) -> None:
        """Let another process have it."""
        self._file.close()

    def _write(self, text: str) -> None:
        # To the system, which keeps it when the process is killed. A line that a power cut loses costs its chunk only: that
        # was on the disk before the line was written.
        self._file.write(text.encode())
        self._file.flush()


def write_array(
    directory: Path,
    array: StoredArray,
    read: Callable[[Box], np.ndarray],
    log: ChunkLog,
    on_bytes: Callable[[int], None],
) -> tuple[str, ...]:
    """Write the chunks of one array that are not there yet; one chunk is in memory at a time.

    Args:
        directory: directory of the checkpoint.
        array: array to write.
        read: function that gives the values of a region, of the array's dtype.
        log: log of the conversion.
        on_bytes: function that is called with the bytes of each chunk when it is there.

    Returns:
        Digests of the chunks.
    """
    import tensorstore

    place = directory / WEIGHTS / array.path
    metadata = {
        "zarr_format": 2,
        "shape": list(array.shape),
        "chunks": list(array.chunk_shape),
        "dtype": array.dtype.str if array.dtype.isbuiltin == 1 else array.dtype.name,
        "order": "C",
        "compressor": None,
        "filters": None,
        "fill_value": None,
        "dimension_separator": ".",
    }
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(place)},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
    }
    store = tensorstore.open(spec, open=True, create=True).result()
    digests = []
    for start in array.starts:
        shape = array.part(start)
        digest = log.digests.get((array.path, start))
        if digest is None or not (place / array.file(start)).is_file():
            corner = (start, *[0] * len(shape[1:])) if shape else ()
            box = tuple([(first, first + size) for first, size in zip(corner, shape, strict=True)])
            values = np.ascontiguousarray(read(box)).reshape(shape)
            assert values.dtype == array.dtype, f"{array.path} is {array.dtype}, and what is read {values.dtype}"
            store[tuple([slice(*bounds) for bounds in box])].write(values).result()
            digest = digest_of(values)
            log.add(array.path, start, digest)
            del values
        digests.append(digest)
        on_bytes(int(np.prod(shape, dtype=np.int64)) * array.dtype.itemsize)
    return tuple(digests)


def write_tree(directory: Path, arrays: Iterable[StoredArray]) -> None:
    """Make the arrays that are there an Orbax checkpoint.

    Orbax saves a tree of the same names, of a number each, in a folder of its own. The names are what its metadata is about;
    shapes and dtypes are read from the arrays. The file that a checkpoint is known by comes last.
    """
    import orbax.checkpoint as ocp

    tree = (directory / _TREE).resolve()
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of files of the other kind of checkpoint that it does not find
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            names = {array.path: np.zeros((), array.dtype) for array in arrays}
            checkpointer.save(tree, args=ocp.args.PyTreeSave(names))
    finally:
        log.setLevel(level)
    files = [path for path in tree.iterdir() if path.is_file()]
    for path in sorted(files, key=lambda path: path.name == "_METADATA"):
        path.rename(directory / WEIGHTS / path.name)
    shutil.rmtree(tree)


def digest_of(values: np.ndarray) -> str:
    """SHA-256 of the bytes of an array, in row-major order."""
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()
