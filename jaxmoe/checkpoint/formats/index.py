"""Strict reader of ``model.safetensors.index.json``, the list of the tensors with the file of each."""

import os
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats.safetensors import read_json

MAX_INDEX_BYTES = 200_000_000


def read_index(path: str | os.PathLike[str], suffix: str = ".safetensors") -> dict[str, str]:
    """Read the index of a sharded checkpoint.

    Args:
        path: ``model.safetensors.index.json``: ``{"metadata": {...}, "weight_map": {tensor: file}}``.
        suffix: end of the names of its files; ".bin" in ``pytorch_model.bin.index.json``.

    Returns:
        tensor name -> file name, a plain name beside the index.

    Raises:
        CheckpointError: the index is not such a document, or names a file elsewhere.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)

    def refuse(rule: str, value: str) -> NoReturn:
        raise CheckpointError(f"{path}: {rule}; {value}; repair the index, or download the checkpoint again")

    document = read_json(path, "an index", MAX_INDEX_BYTES, refuse)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        refuse("an index must have a weight_map of tensor names to file names", "it has none")
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            refuse("a file name in the weight_map must be a string", f"that of {tensor!r} is {file!r}")
        if not _is_plain(file, suffix):
            refuse(
                f"the weight_map must name {suffix} files beside the index, without any path",
                f"tensor {tensor!r} is said to be in {file!r}",
            )
    return weight_map


@lru_cache  # thousands of tensors are in a few files
def _is_plain(name: str, suffix: str) -> bool:
    """Whether `name` is that of a file of weights in the same directory, whatever the system's path rules."""
    return name.endswith(suffix) and not name.startswith(".") and not any(bad in name for bad in "/\\:\0")
