"""Hashes that tell whether files are those of before: of an input file all of it, of a checkpoint enough of it."""

import hashlib
import os
import struct
from pathlib import Path

# Files up to this size are read whole; larger ones, which are weights, by samples.
WHOLE_BYTES = 32 * 2**20
SAMPLES, SAMPLE_BYTES = 16, 64 * 2**10
_MOST_HEADER = 100 * 2**20


def file_hash(path: Path) -> tuple[str, int]:
    """SHA-256 of a whole file, and its size in bytes."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return digest, file.tell()


def checkpoint_hash(directory: Path) -> str:
    """SHA-256 of a checkpoint directory, without reading all of its weights.

    It covers the name and size of every file in the directory and in ``additional_chat_templates``, hidden ones left out;
    files of up to 32 MiB (config, tokenizer, templates, index) whole; of larger ones the header of safetensors, with names,
    shapes and dtypes, and 16 samples of 64 KiB, the first at the beginning and the last at the end. It does not cover
    where the directory is, times, and bytes of large files between the samples: weights that differ there alone, and in
    no size, go unnoticed.

    Raises:
        OSError: a file cannot be read.
    """
    found = hashlib.sha256()
    folders = [directory, directory / "additional_chat_templates"]
    files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
    named = sorted((file.relative_to(directory).as_posix(), file) for file in files if file.is_file())
    for name, file in named:
        if not file.name.startswith("."):
            size = file.stat().st_size
            found.update(f"{name}\0{size}\0".encode() + _digest(file, size))
    return found.hexdigest()


def _digest(file: Path, size: int) -> bytes:
    found = hashlib.sha256()
    with file.open("rb") as opened:
        if size <= WHOLE_BYTES:
            return hashlib.file_digest(opened, "sha256").digest()
        if file.suffix == ".safetensors":
            (header,) = struct.unpack("<Q", opened.read(8))
            found.update(opened.read(min(header, _MOST_HEADER)))
        for index in range(SAMPLES):
            opened.seek((size - SAMPLE_BYTES) * index // (SAMPLES - 1), os.SEEK_SET)
            found.update(opened.read(SAMPLE_BYTES))
    return found.digest()
