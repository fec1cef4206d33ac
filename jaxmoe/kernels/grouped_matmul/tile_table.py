"""Tile sizes that were measured to be fastest, as JSON files: one file a kind of device.

A kernel asks `lookup` and falls back to defaults of its own where the tables are silent. Files are written by
`jaxmoe tune` on the device itself; there is none for a device that nobody has measured. The user's own tables go
before those of the package. A file is

    {"device": "NVIDIA H100 80GB HBM3", "entries": [{"kernel": "mosaic_gpu", "dtype": "bfloat16", "out_dtype": "float32",
        "K": 14336, "N": 4096, "row_class": 128, "tiles": {...}, "seconds": 0.0012, ...}]}
"""

import copy
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxmoe.kernels.grouped_matmul.quantized import Matrices, QuantizedStack
from jaxmoe.user_files import data_folder

TILE_TABLES = Path(__file__).with_name("tile_tables")

# Names by whose values an entry is found.
KEY = ("kernel", "dtype", "out_dtype", "K", "N", "row_class")


def row_class(rows_per_group: float) -> int:
    """The class that shapes of so many rows a group are tuned for: the next power of two, 1 at least.

    >>> [row_class(rows) for rows in (0, 1, 3, 128, 129)]
    [1, 1, 4, 128, 256]
    """
    return 1 << (max(1, math.ceil(rows_per_group)) - 1).bit_length()


def table_file(device_kind: str, folder: Path = TILE_TABLES) -> Path:
    """The file that has the tiles of a kind of device.

    >>> table_file("NVIDIA H100 80GB HBM3").name
    'nvidia_h100_80gb_hbm3.json'
    """
    return folder / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json")


def lookup(
    device_kind: str,
    *,
    kernel: str,
    dtype: str,
    out_dtype: str,
    K: int,
    N: int,
    rows_per_group: float,
    folders: Sequence[Path] | None = None,
) -> dict[str, Any] | None:
    """Find what was measured for matrices [N, K] with so many rows a group on average.

    Args:
        device_kind: kind of device, as `jax.Device.device_kind` has it.
        kernel: a backend, such as "triton"; or "triton.gate_up" for gate and up in one, with the activation.
        dtype: dtype of rows and matrices, such as "bfloat16".
        out_dtype: dtype of the result.
        K: inner dimension.
        N: output dimension, of gate and up together.
        rows_per_group: allocated rows by groups, which shapes alone tell.
        folders: folders of the tables, of which the first with such an entry counts; None for the user's and the package's.

    Returns:
        The entry, whose "tiles" are arguments of the kernel's own type of tiles; None where nothing was measured.

    Raises:
        ValueError: the device's file is no table, or one of another device.
    """
    key = (kernel, dtype, out_dtype, K, N, row_class(rows_per_group))
    for folder in _all_tables() if folders is None else folders:
        entry = _read(device_kind, folder).get(key)
        if entry is not None:
            return copy.deepcopy(entry)
    return None


def measured_tiles(
    make: Callable[..., Any],
    device_kind: str | None,
    kernel: str,
    rows: jax.Array,
    matrices: Matrices,
    out_dtype: DTypeLike,
) -> Any | None:
    """`lookup` for rows [R, K] and matrices [G, N, K], as what `make` makes of it; None for packed matrices.

    Args:
        make: type of the kernel's tiles.
        device_kind: kind of device; None if it is not known, and then nothing is measured.
        kernel: name of the kernel, as for `lookup`.
        rows: rows that are multiplied; only shape and dtype matter.
        matrices: matrices that they are multiplied with; only shape and dtype matter.
        out_dtype: dtype of the result.
    """
    if device_kind is None or isinstance(matrices, QuantizedStack):
        return None
    G, N, K = matrices.shape
    found = lookup(
        device_kind,
        kernel=kernel,
        dtype=rows.dtype.name,
        out_dtype=jnp.dtype(out_dtype).name,
        K=K,
        N=N,
        rows_per_group=rows.shape[0] / max(G, 1),
    )
    return None if found is None else make(**found["tiles"])


def tuned_backends(device_kind: str) -> set[str]:
    """The backends that the tables have tiles of, for a kind of device."""
    keys = [key for folder in _all_tables() for key in _read(device_kind, folder)]
    return {kernel.removesuffix(".gate_up") for kernel, *_ in keys}


def user_tables() -> Path:
    """The folder of the tables that the user made."""
    return data_folder() / "tile_tables"


def _all_tables() -> tuple[Path, ...]:
    return user_tables(), TILE_TABLES


@cache
def _read(device_kind: str, folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    entries = read_table(device_kind, folder)["entries"]
    return {tuple(entry[name] for name in KEY): entry for entry in entries}


def read_table(device_kind: str, folder: Path = TILE_TABLES) -> dict[str, Any]:
    """The whole table of a kind of device; one without entries if there is no file.

    Raises:
        ValueError: the device's file is no table, or one of another device.
    """
    file = table_file(device_kind, folder)
    if not file.exists():
        return {"device": device_kind, "entries": []}
    try:
        table = json.loads(file.read_text())
        missing = [name for entry in table["entries"] for name in (*KEY, "tiles") if name not in entry]
        device = table["device"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is no table of tiles ({error!r}): remove it, and write it anew with `jaxmoe tune`"
        ) from error
    if missing or device != device_kind:
        wrong = f"an entry has no {missing[0]}" if missing else f"it was measured on {device!r}"
        raise ValueError(
            f"{file} is no table for {device_kind!r}, {wrong}: remove it, and write it anew with `jaxmoe tune`"
        )
    return table


def write_table(table: dict[str, Any], folder: Path = TILE_TABLES) -> Path:
    """Put entries into the table of their device, in place of older ones of the same key; all of them or none.

    Args:
        table: "device" and "entries", each with the names of `KEY`, "tiles", and how they were found.
        folder: folder of the tables; made if it is not there.

    Returns:
        The file.
    """
    old = read_table(table["device"], folder)["entries"]
    entries = {tuple(entry[name] for name in KEY): entry for entry in [*old, *table["entries"]]}
    file = table_file(table["device"], folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A reader sees the old file or the new one, never half of it.
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        unfinished.write_text(
            json.dumps(table | {"entries": [entries[key] for key in sorted(entries)]}, indent=1) + "\n"
        )
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    _read.cache_clear()
    return file
