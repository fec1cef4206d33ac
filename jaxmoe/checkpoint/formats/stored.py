"""Checkpoints of Orbax arrays that jaxmoe wrote: a model's parameters in logical order, read by byte range.

The arrays are an Orbax checkpoint in the folder `WEIGHTS`: a folder for each, in the format zarr 2, without compression.
A chunk is then a file with the bytes of some rows, in row-major order, and is read like any other file of weights: here it
is a tensor. `jaxmoe_checkpoint.json` says which arrays make up which parameter, and has the digest of every chunk.

Nothing of Orbax or TensorStore is needed to read one.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats.decoded import DecodedTensor
from jaxmoe.checkpoint.formats.dtypes import DTYPE_NAMES
from jaxmoe.checkpoint.formats.files import Checkpoint, ChunkFile
from jaxmoe.checkpoint.formats.safetensors import TensorInfo
from jaxmoe.config import STORED
from jaxmoe.quant.activations import Activations
from jaxmoe.quant.held import HeldFormat
from jaxmoe.quant.packing import Packing
from jaxmoe.quant.weights import QuantizedWeight

WEIGHTS = "weights"
PLACEMENT = "placement.json"
VERSION = 1
_FIELDS = {"version", "tied", "mtp", "parameters", "arrays"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredArray:
    """One array of a checkpoint.

    Attributes:
        path: name of the array, a parameter's path and perhaps the ending of a role.
        shape: shape of it.
        dtype: dtype of it.
        rows: rows of dim 0 in each chunk; the last one may be padded. 1 for an array without dims.
        digests: SHA-256 of the rows of each chunk, without padding.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int
    digests: tuple[str, ...] = ()

    @property
    def starts(self) -> range:
        """First row of each chunk."""
        return range(0, self.shape[0] if self.shape else 1, self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """Shape of every chunk, padding included."""
        return (self.rows, *self.shape[1:]) if self.shape else ()

    def part(self, start: int) -> tuple[int, ...]:
        """Shape of the rows in the chunk that begins at a row."""
        return (min(self.rows, self.shape[0] - start), *self.shape[1:]) if self.shape else ()

    def file(self, start: int) -> str:
        """Name of a chunk's file, as zarr has it."""
        return ".".join([str(start // self.rows), *["0"] * (len(self.shape) - 1)])

    def to_dict(self) -> dict[str, Any]:
        """The array as plain types, for JSON."""
        return {
            "shape": list(self.shape),
            "dtype": self.dtype.name,
            "rows": self.rows,
            "sha256": list(self.digests),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredCheckpoint:
    """A checkpoint of Orbax arrays, its chunks as tensors.

    Attributes:
        checkpoint: tensors, one for each chunk of a plain parameter, or for the chunks of a packed one with the same rows.
        chunks: {path of a parameter: first row of a tensor, and the tensor}.
        tied: whether the embedding is the output projection.
        mtp: whether the layers for multi-token prediction are there.
        digests: every chunk as a tensor of its own, and the SHA-256 of its rows.
        description: contents of `jaxmoe_checkpoint.json`.
    """

    checkpoint: Checkpoint
    chunks: Mapping[str, tuple[tuple[int, TensorInfo], ...]]
    tied: bool
    mtp: bool
    digests: tuple[tuple[TensorInfo, str], ...]
    description: Mapping[str, Any]


def is_stored(path: Path) -> bool:
    """Whether a directory is a checkpoint of Orbax arrays that jaxmoe wrote."""
    return (path / STORED).is_file()


def read_stored(path: Path) -> StoredCheckpoint:
    """Read what is in a checkpoint of Orbax arrays; no array is read.

    Args:
        path: directory that `jaxmoe.convert_to_orbax` made.

    Raises:
        CheckpointError: its description breaks a rule, or a chunk is missing or of another size.
    """
    description = read_description(path)
    try:
        arrays = {name: _array(name, entry) for name, entry in description["arrays"].items()}
        parameters = {
            name: None if entry is None else (_packing(entry), entry["roles"], _activations(entry))
            for name, entry in description["parameters"].items()
        }
        tied, mtp = bool(description["tied"]), bool(description["mtp"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path / STORED}: it does not describe a checkpoint: {type(error).__name__}: {error}; convert it again"
        ) from error
    files: list[ChunkFile] = []
    digests: list[tuple[TensorInfo, str]] = []
    tensors: dict[str, TensorInfo] = {}
    chunks: dict[str, tuple[tuple[int, TensorInfo], ...]] = {}
    for name, packed in parameters.items():
        roles = {"values": name} if packed is None else packed[1]
        if missing := [array for array in roles.values() if array not in arrays]:
            raise CheckpointError(
                f"{path / STORED}: {name} is made of {missing[0]!r}, which is no array; convert it again"
            )
        parts = {role: _chunks(path, arrays[array], files) for role, array in roles.items()}
        for role, array in roles.items():
            digests += zip(parts[role], arrays[array].digests, strict=True)
        if len({len(part) for part in parts.values()}) > 1:
            raise CheckpointError(f"{path / STORED}: the arrays of {name} are not in equal chunks; convert it again")
        found = []
        for index, start in enumerate(arrays[roles["values"]].starts):
            own = {role: part[index] for role, part in parts.items()}
            tensor = own["values"] if packed is None else _held(own, packed[0], packed[2])
            tensors[tensor.name] = tensor
            found.append((start, tensor))
        chunks[name] = tuple(found)
    return StoredCheckpoint(
        checkpoint=Checkpoint(path, tuple(files), tensors),
        chunks=chunks,
        tied=tied,
        mtp=mtp,
        digests=tuple(digests),
        description=description,
    )


def read_description(path: Path) -> dict[str, Any]:
    """Read `jaxmoe_checkpoint.json` of a directory.

    Raises:
        CheckpointError: it is not JSON, or of a version that is not known.
    """
    try:
        description = json.loads((path / STORED).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path / STORED}: it must be JSON: {error}; convert the checkpoint again") from error
    found = description.get("version") if isinstance(description, dict) else None
    if found != VERSION:
        raise CheckpointError(
            f"{path / STORED}: this jaxmoe reads version {VERSION} of its checkpoints of Orbax arrays; this one is of "
            f"version {found!r}; convert the checkpoint again"
        )
    if lacking := _FIELDS - description.keys():
        raise CheckpointError(f"{path / STORED}: it lacks {sorted(lacking)[0]!r}; convert the checkpoint again")
    return dict(description)


def dtype_named(name: str) -> np.dtype:
    """The dtype of a name that NumPy or ml_dtypes has."""
    return np.dtype(getattr(ml_dtypes, name, name))


def _array(name: str, entry: Mapping[str, Any]) -> StoredArray:
    shape = tuple([int(size) for size in entry["shape"]])
    dtype = dtype_named(entry["dtype"])
    if not re.fullmatch(r"[\w.]+", name) or not name.strip("."):
        raise ValueError(f"an array is called by a parameter's path, and not {name!r}")
    if dtype not in DTYPE_NAMES or min(shape, default=1) < 1 or not 1 <= entry["rows"] <= max((1, *shape[:1])):
        raise ValueError(f"array {name!r} is {dtype} {shape} in chunks of {entry['rows']} rows")
    array = StoredArray(path=name, shape=shape, dtype=dtype, rows=entry["rows"], digests=tuple(entry["sha256"]))
    if len(array.digests) != len(array.starts):
        raise ValueError(f"array {name!r} has {len(array.starts)} chunks and {len(array.digests)} digests")
    return array


def _packing(entry: Mapping[str, Any]) -> Packing:
    return Packing(**{**entry["packing"], "block": tuple(entry["packing"]["block"])})


def _activations(entry: Mapping[str, Any]) -> Activations | None:
    return Activations(**entry["activations"]) if entry["activations"] else None


def _chunks(path: Path, array: StoredArray, files: list[ChunkFile]) -> list[TensorInfo]:
    """The chunks of one array as tensors; their files are put to `files`."""
    directory = path / WEIGHTS / array.path
    _check_zarr(directory / ".zarray", array)
    expected = math.prod(array.chunk_shape) * array.dtype.itemsize
    tensors = []
    for start in array.starts:
        file = directory / array.file(start)
        try:
            status = file.stat()
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{file} is missing: a chunk of {array.path}; copy or convert the checkpoint again"
            ) from error
        if status.st_size != expected:
            raise CheckpointError(
                f"{file}: a chunk of {array.path} has {expected} bytes; this one has {status.st_size}; copy or convert the "
                "checkpoint again"
            )
        files.append(ChunkFile(file, status.st_size, status.st_mtime_ns))
        shape = array.part(start)
        one = shape == array.shape
        tensors.append(
            TensorInfo(
                array.path if one else f"{array.path}[{start}:{start + shape[0]}]",
                DTYPE_NAMES[array.dtype],
                array.dtype,
                shape,
                file,
                0,
                math.prod(shape) * array.dtype.itemsize,
            )
        )
    return tensors


def _check_zarr(file: Path, array: StoredArray) -> None:
    """Hold the description of an array against its own metadata, which is what Orbax reads it by."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: the metadata of an array cannot be read: {error}; convert the checkpoint again"
        ) from error
    wanted: dict[str, Any] = {
        "shape": list(array.shape),
        "chunks": list(array.chunk_shape),
        "compressor": None,
        "filters": None,
    }
    wanted |= {"order": "C", "zarr_format": 2}
    for key, value in wanted.items():
        if not isinstance(found, dict) or found.get(key) != value:
            raise CheckpointError(
                f"{file}: {key} of {array.path} is {value!r} by {STORED}, and this has "
                f"{found.get(key) if isinstance(found, dict) else found!r}; convert the checkpoint again"
            )


def _held(parts: Mapping[str, TensorInfo], packing: Packing, activations: Activations | None) -> DecodedTensor:
    """A packed weight as the plain tensor that it stands for."""
    values = parts["values"]
    weight = QuantizedWeight(values.name, HeldFormat(packing, activations=activations), parts, None)
    shape = weight.format.shape_of({"values": values.shape})
    assert shape is not None
    if problems := weight.problems(shape):
        raise CheckpointError(f"{values.file}: {problems[0]}; convert the checkpoint again")
    return DecodedTensor(
        name=values.name,
        dtype_name=weight.format.name,
        dtype=np.dtype(np.float32),
        shape=shape,
        file=values.file,
        offset=0,
        nbytes=sum(part.nbytes for role, part in parts.items() if role != "input_scale"),
        weight=weight.bind(shape),
        parts=parts,
    )
