"""Writes safetensors files byte by byte, right or wrong, and knows nothing of the readers."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.float64): "F64",
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}


def write_raw(path: Path, header: object, data: bytes = b"", pad: int = 0) -> Path:
    """A file with `header` (JSON, text or bytes) whatever it is; `pad` spaces end it."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    header += b" " * pad
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def write_file(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> Path:
    header, data = {}, b""
    if metadata is not None:
        header["__metadata__"] = metadata
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        data += raw
    # An odd header length: readers must not count on any alignment.
    return write_raw(path, header, data, pad=1 - len(json.dumps(header)) % 2)


def write_checkpoint(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> Path:
    """One file, or `shards` of them with an index, tensors dealt out in turn."""
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        write_file(directory / "model.safetensors", tensors)
        return directory
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::shards]}
        write_file(directory / file, part)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return directory


def write_index(directory: Path, weight_map: object) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return path
