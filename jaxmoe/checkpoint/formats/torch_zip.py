"""Strict reader of the zip container of ``torch.save``: where in the file the bytes of each entry are.

torch stores its entries uncompressed, so a tensor is a byte range of the file, as it is in safetensors. Only such
archives are read. The standard library's `zipfile` is made to be lenient: it accepts data before the archive, two
entries of one name, and a local header that says something else than the central directory. Each of these lets
two readers see two different files in the same bytes, so each is refused here.

Source: PKWARE APPNOTE 6.3.10, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end),
4.5.3 (zip64).
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple, NoReturn

from jaxmoe.checkpoint.errors import CheckpointError

MAX_ENTRIES = 1_000_000
MAX_DIRECTORY_BYTES = 200_000_000
MAX_ENTRY_NAME_BYTES = 1024

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64_LOCATOR = struct.Struct("<4sIQI")
_END64 = struct.Struct("<4sQ2H2I4Q")

_STORED = 0
_DESCRIPTOR_FLAG = 0x0008  # sizes follow the data; the local header has zeros
_KNOWN_FLAGS = _DESCRIPTOR_FLAG | 0x0800  # and UTF-8 names
_ZIP64_EXTRA = 0x0001
_FULL_16, _FULL_32 = 0xFFFF, 0xFFFF_FFFF  # "the number is in the zip64 record"
_END_FULL = (_FULL_16,) * 4 + (_FULL_32,) * 2
_LOCATOR_SIGNATURE = b"PK\x06\x07"

_CUT = "the file is damaged or its download was cut; download it again"
_RESAVE = "save the checkpoint again with torch.save, or as safetensors"


class ZipEntry(NamedTuple):
    """One stored entry: `size` bytes of the file from byte `offset`."""

    offset: int
    size: int


class _Central(NamedTuple):
    """One entry as the central directory has it."""

    name: str
    raw_name: bytes
    flags: int
    crc: int
    size: int
    header: int


def read_stored_zip(path: Path, descriptor: int, size: int) -> dict[str, ZipEntry]:
    """Find the entries of a zip archive of which all are stored.

    Args:
        path: the file, for messages.
        descriptor: the same, open for reading.
        size: its bytes.

    Returns:
        Entry name -> where its data is, in the order of the data. The data itself is not read.

    Raises:
        CheckpointError: the archive breaks a rule of the format, or is compressed, encrypted or ambiguous.
    """
    return _Archive(path, descriptor, size).entries()


class _Archive:
    """One archive being read: every refusal names the file."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size = size

    def refuse(self, rule: str, value: str, way_out: str = _RESAVE) -> NoReturn:
        raise CheckpointError(f"{self.path}: {rule}; {value}; {way_out}")

    def read(self, offset: int, length: int, what: str) -> bytes:
        if not 0 <= offset <= self.size - length:
            self.refuse(
                f"{what} must lie inside the file",
                f"it is {length} bytes at {offset} and the file has {self.size}",
                _CUT,
            )
        data = os.pread(self.descriptor, length, offset)
        if len(data) != length:
            self.refuse(f"{what} must lie inside the file", f"{len(data)} of its {length} bytes could be read", _CUT)
        return data

    def entries(self) -> dict[str, ZipEntry]:
        start, length, count = self.find_directory()
        central = self.parse_directory(self.read(start, length, "the central directory"), count)
        central.sort(key=lambda entry: entry.header)
        result: dict[str, ZipEntry] = {}
        position, previous = 0, ""
        for entry in central:
            if entry.header < position:
                self.refuse("entries must not overlap", f"{entry.name!r} starts inside {previous!r}")
            offset = self.check_local_header(entry)
            position, previous = offset + entry.size, entry.name
            if position > start:
                self.refuse(
                    "entries must end before the central directory",
                    f"{entry.name!r} ends at {position} and the directory starts at {start}",
                )
            if entry.name in result:
                self.refuse("an entry's name must be there only once", f"{entry.name!r} is there twice")
            result[entry.name] = ZipEntry(offset, entry.size)
        return result

    def find_directory(self) -> tuple[int, int, int]:
        """Start, bytes and number of entries of the central directory."""
        # Looking for the record further up, behind a comment, is what makes an archive mean two things.
        at = self.size - _END.size
        if at < 0:
            self.refuse("a zip archive ends with its directory", f"the file has {self.size} bytes", _CUT)
        end = self.read(at, _END.size, "the end of the directory")
        signature, disk, directory_disk, on_disk, count, length, start, comment = _END.unpack(end)
        if signature != b"PK\x05\x06" or comment:
            self.refuse("a zip archive must end with the end record of its directory", "this file does not", _CUT)
        narrow = (disk, directory_disk, on_disk, count, length, start)
        # torch writes the wide record into every file, also where the plain one would do.
        if self.has_locator(at) or any(a == full for a, full in zip(narrow, _END_FULL, strict=True)):
            at, (disk, directory_disk, on_disk, count, length, start) = self.find_directory64(at, narrow)
        if disk or directory_disk or on_disk != count:
            self.refuse("a checkpoint must be one archive", "this is a part of one that was split")
        if start + length != at:
            self.refuse(
                "the central directory must end where its end record starts",
                f"it is {length} bytes at {start}, and the record is at {at}",
                _CUT,
            )
        if count > MAX_ENTRIES or length > MAX_DIRECTORY_BYTES:
            self.refuse(
                f"an archive has at most {MAX_ENTRIES} entries and {MAX_DIRECTORY_BYTES} bytes of directory",
                f"this one has {count} and {length}",
            )
        return start, length, count

    def has_locator(self, end: int) -> bool:
        at = end - _END64_LOCATOR.size
        return at >= 0 and self.read(at, 4, "the zip64 locator") == _LOCATOR_SIGNATURE

    def find_directory64(self, end: int, narrow: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """The place of the zip64 end record, and the six numbers in it for which the plain one may be too narrow."""
        at = end - _END64_LOCATOR.size
        locator = self.read(at, _END64_LOCATOR.size, "the zip64 locator")
        signature, locator_disk, record, disks = _END64_LOCATOR.unpack(locator)
        if signature != _LOCATOR_SIGNATURE or locator_disk or disks > 1 or record != at - _END64.size:
            self.refuse("a zip64 archive must have a locator of its end record", "this one has no valid one", _CUT)
        fields = _END64.unpack(self.read(record, _END64.size, "the zip64 end record"))
        if fields[0] != b"PK\x06\x06" or fields[1] != _END64.size - 12:
            self.refuse("a zip64 archive must have a zip64 end record", "this one has no valid one", _CUT)
        wide = fields[4:]
        if any(a not in (b, full) for a, b, full in zip(narrow, wide, _END_FULL, strict=True)):
            self.refuse("the two end records must agree", f"one has {narrow} and the other {wide}")
        return record, wide

    def parse_directory(self, directory: bytes, count: int) -> list[_Central]:
        """The entries that the central directory lists."""
        result = []
        position = 0
        for _ in range(count):
            if position + _CENTRAL.size > len(directory):
                self.refuse("the central directory must hold all its entries", f"{count} do not fit", _CUT)
            fields = _CENTRAL.unpack_from(directory, position)
            signature, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment = fields[:13]
            disk, header = fields[13], fields[16]
            if signature != b"PK\x01\x02":
                self.refuse(
                    "the central directory must be a list of entries", f"byte {position} of it starts none", _CUT
                )
            name_at = position + _CENTRAL.size
            extra_at = name_at + name_length
            position = extra_at + extra_length + comment
            if position > len(directory):
                self.refuse("the central directory must hold all its entries", f"{count} do not fit", _CUT)
            raw_name = directory[name_at:extra_at]
            name = self.check_name(raw_name)
            extra = directory[extra_at : extra_at + extra_length]
            size, packed, header, disk = self.widen(
                name, extra, (size, _FULL_32), (packed, _FULL_32), (header, _FULL_32), (disk, _FULL_16)
            )
            if method != _STORED or packed != size:
                self.refuse(
                    "entries must be stored, not compressed, because tensors are read by byte range",
                    f"{name!r} has compression method {method}, {packed} bytes of {size}",
                )
            if flags & ~_KNOWN_FLAGS or disk:
                self.refuse(
                    "entries must be plain, not encrypted, patched or split", f"{name!r} has flags {flags:#06x}"
                )
            result.append(_Central(name, raw_name, flags, crc, size, header))
        if position != len(directory):
            self.refuse(
                "the central directory must end with its last entry", f"{len(directory) - position} bytes follow"
            )
        return result

    def check_name(self, raw: bytes) -> str:
        if len(raw) > MAX_ENTRY_NAME_BYTES:
            self.refuse(f"an entry's name has at most {MAX_ENTRY_NAME_BYTES} bytes", f"{raw[:40]!r}... has {len(raw)}")
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse("entry names must be UTF-8", f"one is {raw[:40]!r}")
        if not name or name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            self.refuse("entry names must be relative paths without '..'", f"one is {name[:80]!r}")
        return name

    def widen(self, name: str, extra: bytes, *fields: tuple[int, int]) -> list[int]:
        """The values of `fields` (value, sentinel), taken from the zip64 extra field where they are sentinels."""
        if all(value != sentinel for value, sentinel in fields):
            return [value for value, _ in fields]
        wide, position = b"", 0
        while position + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, position)
            if kind == _ZIP64_EXTRA:
                wide = extra[position + 4 : position + 4 + length]
                break
            position += 4 + length
        result, position = [], 0
        for value, sentinel in fields:
            if value == sentinel:
                width = 4 if sentinel == _FULL_16 else 8
                if position + width > len(wide):
                    self.refuse(
                        "a large entry must have a zip64 field with its numbers", f"that of {name!r} has not", _CUT
                    )
                value = int.from_bytes(wide[position : position + width], "little")
                position += width
            result.append(value)
        return result

    def check_local_header(self, entry: _Central) -> int:
        """Byte at which the entry's data starts; refuses a header that contradicts the central directory."""
        what = f"the header of {entry.name!r}"
        raw = self.read(entry.header, _LOCAL.size, what)
        signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(raw)
        if signature != b"PK\x03\x04":
            self.refuse("the central directory must point to headers", f"at {entry.header} there is none", _CUT)
        rest = self.read(entry.header + _LOCAL.size, name_length + extra_length, what)
        size, packed = self.widen(entry.name, rest[name_length:], (size, _FULL_32), (packed, _FULL_32))
        # Cut, as a header may claim any length of name; a name that goes on is another one all the same.
        said = [rest[: min(name_length, len(entry.raw_name) + 1)], flags, method]
        true = [entry.raw_name, entry.flags, _STORED]
        # A writer that streams does not know CRC and sizes yet when it writes the header.
        if not (entry.flags & _DESCRIPTOR_FLAG and crc == packed == size == 0):
            said += [crc, packed, size]
            true += [entry.crc, entry.size, entry.size]
        if said != true:
            self.refuse(
                "an entry's header must agree with the central directory",
                f"that of {entry.name!r} says {said} and the directory {true}",
            )
        return entry.header + _LOCAL.size + name_length + extra_length
