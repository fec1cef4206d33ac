"""Strict reader of safetensors headers, which tell what is in a file before any weight byte is read.

The format (huggingface/safetensors, README "Format"): 8 bytes little-endian header length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, then the data. Offsets count from the end of the
header. The file came from somewhere, so nothing in it is believed: sizes are checked against the file before they
are used, and tensors must fill the data without gap or overlap, which rules out hidden payloads and headers that
make a small file expand to a huge model.
"""

import dataclasses
import itertools
import json
import math
import os
import stat
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats.dtypes import ELEMENT_TYPES
from jaxmoe.config import way_to_file

Split = tuple[tuple[int, ...], ...]
"""For each dim of a tensor the dims that it is split in, outermost first; () where none is split."""

MAX_HEADER_BYTES = 100_000_000  # the reference reader's cap
MAX_TENSORS = 1_000_000
MAX_NAME_BYTES = 1024
MAX_RANK = 8
MAX_DIM = 2**48
MAX_JSON_VALUES = 14 * MAX_TENSORS  # a tensor's entry has an object, two lists and up to 11 commas

_LENGTH_BYTES = 8
_FIELDS = {"dtype", "shape", "data_offsets"}
_BROKEN = "the file is damaged or was not written by a safetensors writer; download or convert it again"
_CUT = "the file is damaged or its download was cut; download it again"


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """The name, type and shape of one tensor of a checkpoint, and the place of its bytes.

    Attributes:
        name: its name, "model.layers.0.mlp.gate.weight".
        dtype_name: its element type as the file names it, "BF16".
        dtype: the same as a NumPy dtype; None for types smaller than a byte.
        shape: its dims.
        file: the file it is in.
        offset: byte of `file` at which its data starts; need not be aligned to anything.
        nbytes: bytes of data.
        dim_order: its dims from the outermost in the file to the innermost, where they are not in the order of `shape`:
            (1, 0) is a matrix that was saved transposed. None where they are, as in all safetensors.
    """

    name: str
    dtype_name: str
    dtype: np.dtype | None
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int
    dim_order: tuple[int, ...] | None = None

    @property
    def form(self) -> str:
        """The format and settings of a quantized weight, "plain" of any other tensor."""
        return "plain"

    def as_stored(self) -> Self:
        """The same bytes as a row-major tensor, whose dim j is dim ``dim_order[j]`` of this one."""
        if self.dim_order is None:
            return self
        shape = tuple([self.shape[dim] for dim in self.dim_order])
        return dataclasses.replace(self, shape=shape, dim_order=None)

    def split(self, split: Split) -> Self:
        """The same bytes with each dim as the dims that it is split in; () leaves it as it is."""
        if not split:
            return self
        assert self.shape == tuple([math.prod(sizes) for sizes in split]), f"{self.name} {self.shape} as {split}"
        shape = tuple(itertools.chain(*split))
        if self.dim_order is None:
            return dataclasses.replace(self, shape=shape)
        count = itertools.count()
        parts = [[next(count) for _ in sizes] for sizes in split]
        return dataclasses.replace(
            self, shape=shape, dim_order=tuple(itertools.chain(*[parts[dim] for dim in self.dim_order]))
        )


@dataclasses.dataclass(frozen=True)
class SafetensorsFile:
    """The header of one file, and enough of its state to notice that it changed afterwards.

    Attributes:
        path: the file.
        tensors: name -> `TensorInfo`, in the order of their data.
        metadata: the ``__metadata__`` of the header.
        size: bytes of the file when its header was read.
        mtime_ns: its modification time then.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    mtime_ns: int


def read_safetensors(path: str | os.PathLike[str], *, max_tensors: int = MAX_TENSORS) -> SafetensorsFile:
    """Read and check the header of a safetensors file.

    Args:
        path: the file. A symbolic link is followed (the Hugging Face hub's cache is made of them).
        max_tensors: tensors that a file may have; one with more is refused.

    Returns:
        Its tensors and metadata; no tensor data is read.

    Raises:
        CheckpointError: the file breaks a rule of the format; the message names the file, the rule and the value.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    # Non-blocking, so that a FIFO of that name is refused below and not waited for; it changes nothing for a file.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: a checkpoint file must be a regular file, and this is not one")
        header, data_start = _read_header(path, file, status.st_size)
    tensors, metadata = _Header(path, header, max_tensors).parse(data_start, status.st_size - data_start)
    return SafetensorsFile(path, tensors, metadata, status.st_size, status.st_mtime_ns)


def _read_header(path: Path, file: Any, size: int) -> tuple[bytes, int]:
    """The header's bytes and the offset at which the data starts."""

    def refuse(rule: str, value: str, way_out: str) -> NoReturn:
        way_out = way_to_file(prefix + file.read(64), f"; {way_out}")
        raise CheckpointError(f"{path}: {rule}; {value}{way_out}")

    prefix = file.read(_LENGTH_BYTES)
    if len(prefix) < _LENGTH_BYTES:
        refuse("a safetensors file starts with the 8-byte length of its header", f"the file has {size} bytes", _CUT)
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        refuse(f"a header has at most {MAX_HEADER_BYTES} bytes", f"this one claims {length}", _BROKEN)
    if _LENGTH_BYTES + length > size:
        refuse(
            "the header must end inside the file",
            f"it claims {length} bytes after the first 8, and the file has {size}",
            _CUT,
        )
    header = file.read(length)
    if len(header) != length:
        refuse("the header must end inside the file", f"{len(header)} of its {length} bytes could be read", _CUT)
    return header, _LENGTH_BYTES + length


class _Header:
    """One header being parsed: every refusal names the file."""

    def __init__(self, path: Path, raw: bytes, max_tensors: int) -> None:
        self.path = path
        self.raw = raw
        self.max_tensors = max_tensors

    def refuse(self, rule: str, value: str, way_out: str = _BROKEN) -> NoReturn:
        raise CheckpointError(f"{self.path}: {rule}; {value}; {way_out}")

    def parse(self, data_start: int, data_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        header = self.decode()
        metadata = self.metadata(header.pop("__metadata__", {}))
        if len(header) > self.max_tensors:
            self.refuse(f"a file has at most {self.max_tensors} tensors", f"this one lists {len(header)}")
        entries = [(*self.entry(name, value), name) for name, value in header.items()]
        # Writers may list tensors in any order; the data has one.
        entries.sort(key=lambda entry: entry[:2])
        self.check_tiling(entries, data_bytes)
        tensors = {
            name: TensorInfo(
                name, dtype_name, ELEMENT_TYPES[dtype_name].dtype, shape, self.path, data_start + begin, end - begin
            )
            for begin, end, dtype_name, shape, name in entries
        }
        return tensors, metadata

    def decode(self) -> dict[str, Any]:
        try:
            text = self.raw.decode("utf-8")
        except UnicodeDecodeError as error:
            self.refuse("the header must be UTF-8", f"byte {error.start} of it is not")
        if not text.startswith("{"):
            self.refuse("the header must start with '{'", f"it starts with {text[:8]!r}")
        header = parse_json(text, lambda rule, value: self.refuse(f"the header must be JSON: {rule}", value))
        if not isinstance(header, dict):
            self.refuse("the header must be a JSON object", f"it is a {type(header).__name__}")
        return header

    def metadata(self, value: Any) -> dict[str, str]:
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            self.refuse("__metadata__ must map strings to strings", f"it is {_short(value)}")
        return value

    def entry(self, name: str, value: Any) -> tuple[int, int, str, tuple[int, ...]]:
        """Check what can be checked of one tensor alone: begin, end, dtype name, shape."""
        self.check_name(name)
        tensor = f"tensor {name!r}"
        if not isinstance(value, dict) or set(value) != _FIELDS:
            self.refuse(f"{tensor} needs exactly dtype, shape and data_offsets", f"it has {_short(value)}")
        dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype_name, str) or dtype_name not in ELEMENT_TYPES:
            known = ", ".join(ELEMENT_TYPES)
            self.refuse(f"{tensor} must have a known dtype", f"it has {_short(dtype_name)}", f"known are {known}")
        if not isinstance(shape, list) or not all(type(dim) is int and 0 <= dim <= MAX_DIM for dim in shape):
            self.refuse(f"the shape of {tensor} must be a list of integers up to 2^48", f"it is {_short(shape)}")
        if len(shape) > MAX_RANK:
            self.refuse(f"{tensor} may have at most {MAX_RANK} dims", f"it has {len(shape)}")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
            self.refuse(f"data_offsets of {tensor} must be two integers", f"they are {_short(offsets)}")
        begin, end = offsets
        if not 0 <= begin <= end:
            self.refuse(f"data_offsets of {tensor} must be 0 <= begin <= end", f"they are {offsets}")
        bits = math.prod(shape) * ELEMENT_TYPES[dtype_name].bits
        if bits % 8:
            self.refuse(f"{tensor} must fill whole bytes", f"{shape} {dtype_name} is {bits} bits")
        if bits // 8 != end - begin:
            self.refuse(
                f"data_offsets of {tensor} must span the bytes of its shape and dtype",
                f"{shape} {dtype_name} is {bits // 8} bytes and the offsets {offsets} span {end - begin}",
            )
        return begin, end, dtype_name, tuple(shape)

    def check_name(self, name: str) -> None:
        """Refuse names that would be dangerous or unreadable wherever they are used as a path or printed."""
        try:
            encoded = name.encode("utf-8")
        except UnicodeEncodeError:
            self.refuse("a tensor name must be valid Unicode", f"{name!r} has a lone surrogate")
        if not name:
            self.refuse("a tensor must have a name", "one is empty")
        if len(encoded) > MAX_NAME_BYTES:
            self.refuse(f"a tensor name has at most {MAX_NAME_BYTES} bytes", f"{name[:40]!r}... has {len(encoded)}")
        if "\0" in name or ".." in name.replace("\\", "/").split("/"):
            self.refuse("a tensor name must hold no NUL and no '..' path component", f"one is {name!r}")

    def check_tiling(self, entries: list[tuple[int, int, str, tuple[int, ...], str]], data_bytes: int) -> None:
        """Refuse gaps, overlaps and a data section of another length than the tensors."""
        position, previous = 0, None
        for begin, end, _, _, name in entries:
            if begin > position:
                self.refuse(
                    "tensors must follow each other without gaps",
                    f"tensor {name!r} starts at {begin} and the one before it ends at {position}",
                )
            if begin < position:
                self.refuse(
                    "tensors must not overlap",
                    f"tensor {name!r} starts at {begin}, inside {previous!r}, which ends at {position}",
                )
            position, previous = end, name
        if position > data_bytes:
            self.refuse(
                "the file must hold all its tensors", f"they need {position} bytes and it has {data_bytes}", _CUT
            )
        if position < data_bytes:
            self.refuse("the data must end with the last tensor", f"{data_bytes - position} bytes follow it")


def parse_json(text: str, refuse: Callable[[str, str], NoReturn]) -> Any:
    """Parse JSON without the liberties Python takes: no duplicate keys, no NaN, no negative zero, no deep nesting.

    Nor more values than a header of `MAX_TENSORS` has: as objects they take up to thirty times the bytes of their text.

    Args:
        text: the document.
        refuse: function that is called with (rule, value received) where it breaks one; must raise.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice, count = Counter(name for name, _ in pairs).most_common(1)[0]
            refuse("a key may be there only once", f"{twice!r} is there {count} times")
        return result

    def integer(digits: str) -> int:
        # -0 would become 0, and int() refuses, or takes very long for, thousands of digits.
        if digits == "-0" or len(digits) > 20:
            refuse("a number must be a 64-bit integer", f"one is {digits[:24]}")
        return int(digits)

    def constant(name: str) -> NoReturn:
        refuse("only JSON values are allowed", f"one is {name}")

    values = sum(text.count(mark) for mark in ",[{")
    if values > MAX_JSON_VALUES:
        refuse(f"it may have up to {MAX_JSON_VALUES} values", f"it has {values}")
    try:
        return json.loads(text, object_pairs_hook=unique, parse_int=integer, parse_constant=constant)
    except json.JSONDecodeError as error:
        refuse("it must be well-formed", f"{error.msg} at character {error.pos}")
    except RecursionError:
        refuse("it must not be nested deeply", "it nests deeper than the parser follows")


def read_json(path: Path, what: str, max_bytes: int, refuse: Callable[[str, str], NoReturn]) -> Any:
    """Read a small JSON file as strictly as `parse_json` does.

    Args:
        path: the file.
        what: noun for it in the rules, "an index".
        max_bytes: bytes that it may have; they are counted before it is read.
        refuse: function that is called with (rule, value received) where it breaks one; must raise.
    """
    size = path.stat().st_size
    if size > max_bytes:
        refuse(f"{what} has at most {max_bytes} bytes", f"this one has {size}")
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        refuse(f"{what} must be UTF-8", f"byte {error.start} of it is not")
    return parse_json(text, lambda rule, value: refuse(f"{what} must be JSON: {rule}", value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
