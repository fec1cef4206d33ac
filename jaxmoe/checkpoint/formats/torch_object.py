"""Files of ``torch.save`` that are no checkpoints: nested dicts and lists with tensors anywhere in them."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.checkpoint.formats.safetensors import TensorInfo
from jaxmoe.checkpoint.formats.torch_file import TorchArchive, open_archive
from jaxmoe.checkpoint.formats.torch_pickle import TensorRef


def read_torch_object(path: str | os.PathLike[str]) -> Any:
    """Read all that a file of ``torch.save`` holds into memory, running nothing that is in it.

    Args:
        path: the file.

    Returns:
        The saved object, made of dict, list, tuple, str, int, float, bool and None, with an array for every tensor.

    Raises:
        CheckpointError: the file breaks a rule of the format, or holds objects or tensors of another kind; the message
            names the file, the rule and the value.
        FileNotFoundError: there is no such file.

    Example:
        >>> read_torch_object("tests/checkpoint/data/torch_recorder.pt")["last_physical_to_logical_map"].shape
        (2, 5)
    """
    with open_archive(Path(path)) as archive:
        whole = [archive.document()]
        # A pickle can nest without limit and contain itself: a list of what is left to look at, and no recursion.
        waiting: list[Any] = [whole]
        seen: set[int] = set()
        total = 0
        while waiting:
            container = waiting.pop()
            for key, value in list(container.items() if type(container) is dict else enumerate(container)):
                if type(value) is TensorRef:
                    if type(container) is tuple:
                        archive.refuse("tensors are in dicts and lists", f"one is in a tuple of {len(container)}")
                    info = archive.locate(str(key)[:80], value)
                    total += info.nbytes
                    archive.check_sharing(total)
                    container[key] = _array(archive, info)
                elif type(value) in (dict, list, tuple) and id(value) not in seen:
                    seen.add(id(value))
                    waiting.append(value)
        return whole[0]


def _array(archive: TorchArchive, info: TensorInfo) -> np.ndarray:
    stored = info.as_stored()
    data = np.fromfile(archive.path, stored.dtype, math.prod(stored.shape), offset=info.offset).reshape(stored.shape)
    return data if info.dim_order is None else data.transpose(np.argsort(info.dim_order))
