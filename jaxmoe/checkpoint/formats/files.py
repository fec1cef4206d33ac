"""The files of a checkpoint: a directory, or one file of weights, as one set of tensors."""

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jaxmoe.checkpoint.errors import CheckpointError, Problems
from jaxmoe.checkpoint.formats.index import read_index
from jaxmoe.checkpoint.formats.safetensors import SafetensorsFile, TensorInfo, read_safetensors
from jaxmoe.checkpoint.formats.torch_file import TorchFile, read_torch_file
from jaxmoe.config import STORED, find_checkpoint, shard_of


@dataclasses.dataclass(frozen=True)
class Container:
    """A format of files of weights.

    Attributes:
        single: name of the file where there is one.
        index: the name of the index where there are several.
        suffixes: ends of the names of its files; the first is that of files in an index.
        read: function that reads what is in a file, but no weights.
    """

    single: str
    index: str
    suffixes: tuple[str, ...]
    read: Callable[[Path], SafetensorsFile | TorchFile]


SAFETENSORS = Container("model.safetensors", "model.safetensors.index.json", (".safetensors",), read_safetensors)
TORCH = Container(
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    (".bin", ".pt", ".pth"),
    partial(read_torch_file, allow_permuted=True),
)
CONTAINERS = (SAFETENSORS, TORCH)
"""In the order in which they are looked for: a directory that has both is read as safetensors."""


@dataclasses.dataclass(frozen=True)
class ChunkFile:
    """A chunk of an array of its own, and enough of its file's state to notice that it changed afterwards.

    Attributes:
        path: the file.
        size: bytes of the file when it was looked at.
        mtime_ns: its modification time then.
    """

    path: Path
    size: int
    mtime_ns: int


CheckpointFile = SafetensorsFile | TorchFile | ChunkFile


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """All tensors of a checkpoint; made by `open_checkpoint`.

    Attributes:
        path: the directory, or the file.
        files: its files.
        tensors: name -> `TensorInfo`, over all files.
    """

    path: Path
    files: tuple[CheckpointFile, ...]
    tensors: dict[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def renamed(self, rename: Callable[[str], str]) -> "Checkpoint":
        """The same tensors under the names that `rename` gives them.

        Raises:
            CheckpointError: two tensors would have one name.
        """
        tensors: dict[str, TensorInfo] = {}
        problems = Problems(str(self.path))
        for name, tensor in self.tensors.items():
            new = rename(name)
            if new in tensors:
                problems.add(
                    f"tensor {new!r} is there twice: under this name, and behind the prefix of a multimodal model"
                )
            tensors[new] = tensor if new == tensor.name else dataclasses.replace(tensor, name=new)
        problems.raise_if_any()
        return dataclasses.replace(self, tensors=tensors)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read what is in the files of a checkpoint; no tensor data is read.

    Args:
        path: a directory with ``model.safetensors`` or ``model.safetensors.index.json`` and the files that names, or the
            same with ``pytorch_model.bin``, or one ``.safetensors``, ``.bin`` or ``.pt`` file; see `find_checkpoint`. Shards
            that are numbered and all there need no index. Files may be symbolic links, as they are in the Hugging Face
            hub's cache; the names in an index may not lead out of the directory.

    Returns:
        Every tensor that is there, whether or not an index lists it.

    Raises:
        CheckpointError: a file or the index breaks a rule, or they contradict each other.
        FileNotFoundError: there is no checkpoint there, or a file that the index names is missing.

    Example:
        >>> open_checkpoint("demo").tensors["model.embed_tokens.weight"].shape
        (2048, 192)
    """
    path = find_checkpoint(path)
    if path.is_file():
        container = TORCH if path.suffix in TORCH.suffixes else SAFETENSORS
        return _merge(path, [container.read(path)])
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: there is no such directory; name one with {SAFETENSORS.single} or {SAFETENSORS.index}"
        )
    for container in CONTAINERS:
        if (path / container.index).is_file():
            return _open_sharded(path, container)
        if (path / container.single).is_file():
            return _merge(path, [container.read(path / container.single)])
    for container in CONTAINERS:
        if names := _numbered(path, container):
            return _merge(path, [container.read(path / name) for name in names])
    raise _nothing_found(path)


def _open_sharded(path: Path, container: Container) -> Checkpoint:
    single, index = container.single, container.index
    weight_map = read_index(path / index, container.suffixes[0])
    names = sorted(set(weight_map.values()))
    if (path / single).is_file() and single not in names:
        raise CheckpointError(
            f"{path}: a checkpoint is one {single} or the files of an index; both are there and the index does "
            f"not name {single}; remove the one that is not meant"
        )
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{path}: {len(missing)} of the {len(names)} files that {index} names are missing, the first is "
            f"{missing[0]!r}; finish the download"
        )
    checkpoint = _merge(path, [container.read(path / name) for name in names])
    problems = Problems(str(path / index))
    for tensor, name in weight_map.items():
        found = checkpoint.tensors.get(tensor)
        if found is None:
            problems.add(f"tensor {tensor!r} is said to be in {name!r}, which does not hold it")
        elif found.file.name != name:
            problems.add(f"tensor {tensor!r} is said to be in {name!r} and is in {found.file.name!r}")
    problems.raise_if_any()
    return checkpoint


def _numbered(path: Path, container: Container) -> list[str]:
    """Find the shards of a checkpoint whose index is missing, by their numbers; [] where no file is numbered.

    Raises:
        CheckpointError: there are several sets of shards.
        FileNotFoundError: numbers are missing.
    """
    sets: dict[str, dict[int, str]] = defaultdict(dict)
    totals = {}
    for file in path.iterdir():
        shard = shard_of(file.name)
        if shard is not None and file.suffix in container.suffixes:
            name, number, totals[name] = shard
            sets[name][number] = file.name
    if len(sets) > 1:
        raise CheckpointError(
            f"{path}: without {container.index} a checkpoint is one set of numbered files; there are {len(sets)}: "
            f"{', '.join(sorted(sets)[:3])}; remove those that are not meant"
        )
    for name, files in sets.items():
        missing = [number for number in range(1, totals[name] + 1) if number not in files]
        if missing:
            listed = ", ".join(repr(name.replace("*", f"{number:05d}")) for number in missing[:3])
            raise FileNotFoundError(
                f"{path}: {container.index} is missing, and {len(missing)} of the {totals[name]} files of {name} are too: "
                f"{listed}{' and more' if len(missing) > 3 else ''}; finish the download"
            )
        return [files[number] for number in range(1, totals[name] + 1)]
    return []


def _merge(path: Path, files: list[SafetensorsFile | TorchFile]) -> Checkpoint:
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
    """Say what is there instead: most often a lone file of another name."""
    if (path / STORED).is_file():
        return FileNotFoundError(
            f"{path}: it has a model's parameters as Orbax arrays (jaxmoe convert --to orbax), which jaxmoe loads, plans, "
            "inspects and converts back; what is asked for needs the tensors of the original: name that one"
        )
    other = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    if other:
        hint = f"it holds {', '.join(other[:3])}; if one file is the whole checkpoint, name that file"
    else:
        hint = "it holds no weights at all; is this the right directory?"
    return FileNotFoundError(f"{path}: a checkpoint needs {SAFETENSORS.single} or {SAFETENSORS.index}; {hint}")
