"""The files of a checkpoint: a directory, or one safetensors file, as one set of tensors."""

import dataclasses
import os
from pathlib import Path

from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.index import read_index
from jaxmoe.checkpoint.safetensors import SafetensorsFile, TensorInfo, read_safetensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint; made by `open_checkpoint`.

    Attributes:
        path: the directory, or the file.
        files: its safetensors files.
        tensors: name -> `TensorInfo`, over all files.
    """

    path: Path
    files: tuple[SafetensorsFile, ...]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the headers of a checkpoint in safetensors format; no tensor data is read.

    Args:
        path: a directory with ``model.safetensors`` or ``model.safetensors.index.json`` and the files that names,
            or one ``.safetensors`` file. Files may be symbolic links, as they are in the Hugging Face hub's cache;
            the names in an index may not lead out of the directory.

    Returns:
        Every tensor that is there, whether or not an index lists it.

    Raises:
        CheckpointError: a file or the index breaks a rule, or they contradict each other.
        FileNotFoundError: there is no checkpoint there, or a file that the index names is missing.

    Example:
        >>> open_checkpoint("path/to/Qwen3-30B-A3B").tensors["lm_head.weight"].shape  # doctest: +SKIP
        (151936, 2048)
    """
    path = Path(path)
    if path.is_file():
        return _merge(path, [read_safetensors(path)])
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such directory; name one with {SINGLE_FILE} or {INDEX_FILE}")
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if index.is_file():
        return _open_sharded(path)
    if single.is_file():
        return _merge(path, [read_safetensors(single)])
    raise _nothing_found(path)


def _open_sharded(path: Path) -> Checkpoint:
    weight_map = read_index(path / INDEX_FILE)
    names = sorted(set(weight_map.values()))
    if (path / SINGLE_FILE).is_file() and SINGLE_FILE not in names:
        raise CheckpointError(
            f"{path}: a checkpoint is one {SINGLE_FILE} or the files of an index; both are there and the index does "
            f"not name {SINGLE_FILE}; remove the one that is not meant"
        )
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of the {len(names)} files that {INDEX_FILE} names are missing, the first is "
            f"{missing[0]!r}; finish the download"
        )
    checkpoint = _merge(path, [read_safetensors(path / name) for name in names])
    problems = Problems(str(path / INDEX_FILE))
    for tensor, name in weight_map.items():
        found = checkpoint.tensors.get(tensor)
        if found is None:
            problems.add(f"tensor {tensor!r} is said to be in {name!r}, which does not hold it")
        elif found.file.name != name:
            problems.add(f"tensor {tensor!r} is said to be in {name!r} and is in {found.file.name!r}")
    problems.raise_if_any()
    return checkpoint


def _merge(path: Path, files: list[SafetensorsFile]) -> Checkpoint:
    tensors: dict[str, TensorInfo] = {}
    problems = Problems(str(path))
    for file in files:
        for name, tensor in file.tensors.items():
            if name in tensors:
                problems.add(f"tensor {name!r} is in two files, {tensors[name].file.name!r} and {file.path.name!r}")
            tensors[name] = tensor
    problems.raise_if_any()
    return Checkpoint(path, tuple(files), tensors)


def _nothing_found(path: Path) -> FileNotFoundError:
    """Say what is there instead: most often the torch .bin format, or a lone file of another name."""
    other = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if any(name.endswith(".safetensors") for name in other):
        hint = f"it holds {', '.join(other[:3])}; if one file is the whole checkpoint, name that file"
    elif other:
        hint = f"it holds {', '.join(other[:3])}; save it as safetensors first"
    else:
        hint = "it holds no weights at all; is this the right directory?"
    return FileNotFoundError(f"{path}: a checkpoint needs {SINGLE_FILE} or {INDEX_FILE}; {hint}")
