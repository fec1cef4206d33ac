"""A small assembler of pickles, and archives of torch's form around them."""

import struct
import zipfile
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parent.parent / "checkpoint" / "data"


def count(*shape: int, start: int = 0) -> np.ndarray:
    return np.arange(start, start + np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def pack(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + pack(*arguments) + b"R"


def storage(key: bytes = text("0"), kind: bytes = name("torch", "FloatStorage"), numel: bytes = number(6)) -> bytes:
    return pack(text("storage"), kind, key, text("cpu"), numel) + b"Q"


HOOKS = name("collections", "OrderedDict") + b")R"


REBUILD = name("torch._utils", "_rebuild_tensor_v2")


def tensor(
    view: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    hooks: bytes = HOOKS,
    more: tuple[bytes, ...] = (),
) -> bytes:
    sizes = [pack(*[number(size) for size in sizes]) for sizes in (shape, strides)]
    return call(REBUILD, storage() if view is None else view, number(offset), *sizes, b"\x89", hooks, *more)


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def state_dict(**items: bytes) -> bytes:
    return program(b"}" + b"".join(text(key) + value + b"s" for key, value in items.items()))


GOOD = state_dict(w=tensor())


def archive(
    path: Path, pickled: bytes = GOOD, *, root: str = "archive", more: dict[str, bytes] | None = None, **options: int
) -> Path:
    """An archive of torch's form, written with the standard library."""
    entries = {f"{root}/data.pkl": pickled, f"{root}/data/0": count(6).tobytes(), f"{root}/version": b"3\n"}
    with zipfile.ZipFile(path, "w", **options) as file:
        for entry, data in (entries | (more or {})).items():
            file.writestr(zipfile.ZipInfo(entry), data, **options)
    return path
