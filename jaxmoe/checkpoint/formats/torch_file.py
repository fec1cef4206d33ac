"""Files of ``torch.save`` (``pytorch_model.bin``, ``.pt``): what is in one, before any weight byte is read.

`torch_zip` finds the entries, `torch_pickle` describes the tensors without running anything, and here the two are
joined: each tensor becomes a byte range of the file, so that the loader reads ``.bin`` files shard by shard like
safetensors. Tensors may share a storage (tied embeddings, chunks of one buffer); each has its own range of it.
"""

import contextlib
import dataclasses
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats.dtypes import ELEMENT_TYPES
from jaxmoe.checkpoint.formats.safetensors import MAX_NAME_BYTES, TensorInfo
from jaxmoe.checkpoint.formats.torch_pickle import MAX_PICKLE_BYTES, StorageRef, TensorRef, read_torch_pickle
from jaxmoe.checkpoint.formats.torch_zip import ZipEntry, read_stored_zip
from jaxmoe.config import way_to_file

MAX_SHARING = 64
"""A file may hold tensors of this many times its own size, by sharing storages, and no more."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_MAX_WRAPPED = 3
_LEGACY_START = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # the pickled magic number of torch < 1.6
_CONTIGUOUS = "save it again after tensor.contiguous(), or as safetensors"
_RESAVE = "save the checkpoint again with torch.save(model.state_dict(), ...), or as safetensors"

_DTYPE_NAMES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float4_e2m1fn_x2": "F4",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
    "complex64": "C64",
}
"""torch's name of an element type -> the name in `ELEMENT_TYPES`."""


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """The tensors of one file, and enough of its state to notice that it changed afterwards.

    Attributes:
        path: the file.
        tensors: name -> `TensorInfo`, in the order of the state dict.
        metadata: empty; the format has none.
        size: bytes of the file when it was read.
        mtime_ns: its modification time then.
        skipped: keys of what is no tensor of the state dict: numbers in it, and an optimizer or an epoch beside it.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    mtime_ns: int
    skipped: tuple[str, ...]


def read_torch_file(path: str | os.PathLike[str], *, allow_permuted: bool = False) -> TorchFile:
    """Read what a file of ``torch.save`` holds, running nothing that is in it.

    Args:
        path: the file. A symbolic link is followed (the Hugging Face hub's cache is made of them).
        allow_permuted: whether tensors that were saved transposed are accepted, for a caller that asks
            `TensorInfo.dim_order`.

    Returns:
        Its tensors; no tensor data is read. A state dict may be the whole object, or be in it under ``state_dict``,
        ``model_state_dict``, ``model`` or ``module``.

    Raises:
        CheckpointError: the file breaks a rule of the format, holds more than tensors, or holds tensors that are not
            contiguous; the message names the file, the rule and the value.
        FileNotFoundError: there is no such file.

    Example:
        >>> info = read_torch_file("tests/checkpoint/data/torch_training.pt").tensors["weight"]
        >>> info.dtype_name, info.shape, info.offset
        ('F32', (2, 3), 1088)
    """
    path = Path(path)
    with open_archive(path) as archive:
        tensors, skipped = archive.tensors()
    permuted = [tensor for tensor in tensors.values() if tensor.dim_order is not None]
    if permuted and not allow_permuted:
        archive.refuse("tensors must be contiguous here", f"{permuted[0].name!r} is transposed", _CONTIGUOUS)
    return TorchFile(path, tensors, {}, archive.status.st_size, archive.status.st_mtime_ns, skipped)


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator["TorchArchive"]:
    """Open a file of ``torch.save`` for as long as the ``with`` block lasts.

    Raises:
        CheckpointError: it is no regular file, or no archive that torch writes.
        FileNotFoundError: there is no such file.
    """
    # Non-blocking, so that a FIFO of that name is refused below and not waited for; it changes nothing for a file.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: a checkpoint file must be a regular file, and this is not one")
        _check_start(path, os.pread(descriptor, 64, 0), status.st_size)
        yield TorchArchive(path, descriptor, status, read_stored_zip(path, descriptor, status.st_size))
    finally:
        os.close(descriptor)


def _check_start(path: Path, start: bytes, size: int) -> None:
    """Say what the file is where it is no zip archive."""
    if start.startswith(b"PK\x03\x04"):
        return
    if start.startswith(_LEGACY_START):
        raise CheckpointError(
            f"{path}: a torch file must be in the zip format of torch 1.6 and newer; this one is in the format before "
            "that; rewrite it: torch.save(torch.load(path, weights_only=True), path)"
        )
    rewritten = (
        "; if torch.load reads it, rewrite it: torch.save(torch.load(path, weights_only=True), path), else download it "
        "again"
    )
    raise CheckpointError(
        f"{path}: a torch file is a zip archive; this one of {size} bytes starts with {start[:8]!r}"
        f"{way_to_file(start, rewritten)}"
    )


class TorchArchive:
    """One archive being read: every refusal names the file."""

    def __init__(self, path: Path, descriptor: int, status: os.stat_result, entries: Mapping[str, ZipEntry]) -> None:
        self.path = path
        self.descriptor = descriptor
        self.status = status
        self.entries = entries
        self.root = self.find_root()

    def refuse(self, rule: str, value: str, way_out: str = _RESAVE) -> NoReturn:
        """Raise a `CheckpointError` that names the file, the rule, the value received and the way out."""
        raise CheckpointError(f"{self.path}: {rule}; {value}; {way_out}")

    def find_root(self) -> str:
        """The top directory of the archive's entries."""
        roots = sorted({name.partition("/")[0] for name in self.entries})
        if len(roots) != 1:
            self.refuse("a torch archive has one top directory", f"this one has {', '.join(roots[:3]) or 'none'}")
        root = roots[0]
        if f"{root}/data.pkl" not in self.entries:
            self.refuse("a torch archive has a data.pkl in its top directory", f"{root!r} has none")
        if f"{root}/constants.pkl" in self.entries:
            self.refuse("a checkpoint must be a state dict", "this is a TorchScript program")
        return root

    def read(self, name: str, limit: int) -> bytes:
        """A whole entry, refused above `limit` bytes."""
        entry = self.entries[f"{self.root}/{name}"]
        if entry.size > limit:
            self.refuse(f"{name} has at most {limit} bytes", f"this one has {entry.size}")
        # Its CRC is not asked: torch has an option to write files without, and does not ask either.
        return os.pread(self.descriptor, entry.size, entry.offset)

    def document(self) -> Any:
        """The saved object, with a `TensorRef` for every tensor."""
        if f"{self.root}/byteorder" in self.entries:
            order = self.read("byteorder", 16)
            if order != b"little":
                self.refuse("numbers must be stored little-endian", f"the byteorder is {order!r}")
        return read_torch_pickle(self.read("data.pkl", MAX_PICKLE_BYTES), f"{self.path}, {self.root}/data.pkl")

    def tensors(self) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
        """The tensors of the state dict, and the keys that were passed over."""
        state, skipped = self.find_state_dict(self.document())
        tensors: dict[str, TensorInfo] = {}
        for name, value in state.items():
            if type(value) is TensorRef:
                self.check_name(name)
                tensors[name] = self.locate(name, value)
            elif _holds_tensor(value):
                self.refuse(
                    "a state dict maps names to tensors", f"{str(name)[:80]!r} is a {type(value).__name__} of them"
                )
            else:
                skipped.append(str(name))
        if not tensors:
            self.refuse("a checkpoint must hold tensors", "this one has none")
        self.check_sharing(sum(tensor.nbytes for tensor in tensors.values()))
        return tensors, tuple(skipped)

    def check_sharing(self, total: int) -> None:
        """Refuse tensors that have more bytes in all than sharing explains."""
        if total > MAX_SHARING * self.status.st_size:
            self.refuse(
                f"tensors that share storages may have up to {MAX_SHARING} times the bytes of their file",
                f"these have {total} bytes, and the file {self.status.st_size}",
            )

    def find_state_dict(self, document: Any) -> tuple[dict[Any, Any], list[str]]:
        """The innermost dict under one of the usual keys, and the keys beside it."""
        skipped: list[str] = []
        depth = 0
        while True:
            if type(document) is not dict:
                self.refuse("a checkpoint must be a dict of tensors", f"this one is a {type(document).__name__}")
            wrappers = [key for key in _WRAPPERS if type(document.get(key)) is dict]
            if not wrappers:
                return document, skipped
            if len(wrappers) > 1:
                self.refuse("a file must hold one state dict", f"there are dicts under {' and '.join(wrappers)}")
            if depth == _MAX_WRAPPED:
                self.refuse(f"a state dict may be wrapped {_MAX_WRAPPED} times", "this one is in more dicts")
            skipped += [str(key) for key in document if key != wrappers[0]]
            document = document[wrappers[0]]
            depth += 1

    def check_name(self, name: Any) -> None:
        """Refuse names that would be dangerous or unreadable wherever they are used as a path or printed."""
        if type(name) is not str or not name:
            self.refuse("a tensor must have a name", f"one is {name!r}")
        if len(name.encode()) > MAX_NAME_BYTES:
            self.refuse(f"a tensor name has at most {MAX_NAME_BYTES} bytes", f"{name[:40]!r}... has more")
        if "\0" in name or ".." in name.replace("\\", "/").split("/"):
            self.refuse("a tensor name must hold no NUL and no '..' path component", f"one is {name!r}")

    def locate(self, name: str, tensor: TensorRef) -> TensorInfo:
        """Find and check the byte range of one tensor."""
        dtype_name = _DTYPE_NAMES[tensor.dtype]
        # torch counts packed pairs of 4-bit numbers as elements, safetensors the numbers.
        itemsize = max(ELEMENT_TYPES[dtype_name].bits, 8) // 8
        entry = self.storage_entry(name, tensor.storage)
        numel = math.prod(tensor.shape)
        order = _dim_order(tensor.shape, tensor.strides)
        if order is None:
            self.refuse(
                "tensors must be contiguous, or contiguous with their dims in another order",
                f"{name!r} has shape {tensor.shape} with strides {tensor.strides}",
                _CONTIGUOUS,
            )
        start, nbytes = tensor.offset * itemsize, numel * itemsize
        if start + nbytes > entry.size:
            self.refuse(
                "a tensor must lie inside its storage",
                f"{name!r} needs bytes {start} to {start + nbytes} of storage {tensor.storage.key!r} of {entry.size}",
            )
        shape, row_major = tensor.shape, tuple(range(len(tensor.shape)))
        if dtype_name == "F4":
            if not shape or order != row_major:
                self.refuse("a packed 4-bit tensor must be row-major", f"{name!r} is {shape} in the order {order}")
            shape = (*shape[:-1], 2 * shape[-1])
        dim_order = None if order == row_major else order
        return TensorInfo(
            name, dtype_name, ELEMENT_TYPES[dtype_name].dtype, shape, self.path, entry.offset + start, nbytes, dim_order
        )

    def storage_entry(self, name: str, storage: StorageRef) -> ZipEntry:
        """The entry of a storage, of the size that the pickle claims for it; `name` is for messages."""
        entry = self.entries.get(f"{self.root}/data/{storage.key}")
        if entry is None:
            self.refuse("every storage must be in the file", f"{storage.key!r} of tensor {name!r} is not")
        itemsize = 1 if storage.dtype is None else ELEMENT_TYPES[_DTYPE_NAMES[storage.dtype]].bits // 8
        if storage.numel * itemsize != entry.size:
            self.refuse(
                "a storage must have the size that is claimed for it",
                f"storage {storage.key!r} of tensor {name!r} is to have {storage.numel * itemsize} bytes and has "
                f"{entry.size}",
            )
        return entry


def _dim_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...] | None:
    """Dims from outermost to innermost if together they fill a range without gap or overlap, else None."""
    row_major = tuple(range(len(shape)))
    if 0 in shape:
        return row_major
    # A dim of size 1 may have any stride, and may stand anywhere.
    real = [dim for dim in row_major if shape[dim] != 1]
    by_stride = sorted(real, key=lambda dim: -strides[dim])
    step = 1
    for dim in reversed(by_stride):
        if strides[dim] != step:
            return None
        step *= shape[dim]
    if by_stride == real:
        return row_major
    return (*[dim for dim in row_major if shape[dim] == 1], *by_stride)


def _holds_tensor(value: Any) -> bool:
    """Whether there is a tensor anywhere in `value`, which may be nested, shared and circular without limit."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if type(value) is TensorRef:
            return True
        if type(value) in (dict, list, tuple) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if type(value) is dict else value)
    return False
