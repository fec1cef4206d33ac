"""The place of a checkpoint by what people give for it: a directory, a file in it, or a name on the Hugging Face hub.

A name is looked for in the hub's local cache and nowhere else: nothing is downloaded.
"""

import os
import re
from pathlib import Path

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,6})-of-(?P<total>\d{1,6})(?P<suffix>\.\w+)")
_CACHE = Path("~/.cache/huggingface/hub")

STORED = "jaxmoe_checkpoint.json"
"""The file that describes a checkpoint of Orbax arrays, in its directory; it is written when all else is."""
CONVERTING = "converting.jsonl"
"""The file that a directory has while such a checkpoint is being written to it."""


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Find the directory of a checkpoint, or its one file of weights.

    Args:
        path: a directory; a config.json, an index or one of several shards, which stand for their directory; a file that has
            all weights; a directory of the hub's cache; or a name such as ``owner/name``, for its snapshot there.

    Returns:
        The path of what is meant; `path` itself where there is nothing, so that its reader says what is missing.

    Raises:
        FileNotFoundError: it looks like a name on the hub, and the cache has no snapshot of it; or only what an interrupted
            conversion left of it is there.
        ValueError: the cache has several snapshots of it, and none is the main one; or it is what an interrupted
            conversion left.
    """
    found = Path(path)
    _check_finished(found)
    if found.is_file():
        shard = _SHARD.fullmatch(found.name)
        is_part = found.suffix == ".json" or (shard is not None and int(shard["total"]) > 1)
        return found.parent if is_part else found
    if found.is_dir():
        return _snapshot(found) if (found / "snapshots").is_dir() and not (found / "config.json").exists() else found
    if isinstance(path, str) and _HUB_NAME.fullmatch(path):
        cached = _CACHE.expanduser() / f"models--{path.replace('/', '--')}"
        if (cached / "snapshots").is_dir():
            return _snapshot(cached)
        raise FileNotFoundError(
            f"a checkpoint is a directory with config.json, or the name of a model in the Hugging Face hub's local cache: "
            f"there is no directory {path}, and {_CACHE} has no {cached.name}; download it (hf download {path}), or name "
            "the directory that it is in"
        )
    return found


def partial_directory(path: Path) -> Path:
    """Give the directory that a conversion to Orbax writes to until all is there."""
    return path.with_name(f"{path.name}.partial")


def _check_finished(path: Path) -> None:
    """Refuse what a conversion to Orbax left when it was interrupted, or has not finished yet."""
    for directory in (path, path.parent):
        if (directory / CONVERTING).is_file():
            raise ValueError(
                f"a checkpoint is read when all of it is written, and {directory} is what an unfinished conversion has "
                "written so far; wait for it, or run the same jaxmoe convert again, which goes on where it was interrupted"
            )
    if path.name and not path.exists() and (left := partial_directory(path)).is_dir():
        raise FileNotFoundError(
            f"{path} is not there: its conversion is not finished, and {left} has what is written so far; wait for it, or "
            "run the same jaxmoe convert again, which goes on where it was interrupted"
        )


def directory_of(checkpoint: Path) -> Path:
    """Give the directory that a checkpoint's config.json and tokenizer are in."""
    return checkpoint.parent if checkpoint.is_file() else checkpoint


def shard_of(name: str) -> tuple[str, int, int] | None:
    """Split the name of one of several files, as in ``model-00001-of-00004.safetensors``.

    Returns:
        The name of the set (``model-*-of-00004.safetensors``), the file's number and how many there are; None for another
        name.

    Example:
        >>> shard_of("model-00001-of-00004.safetensors")
        ('model-*-of-00004.safetensors', 1, 4)
    """
    found = _SHARD.fullmatch(name)
    if found is None:
        return None
    return f"{found['stem']}-*-of-{found['total']}{found['suffix']}", int(found["number"]), int(found["total"])


def _snapshot(cached: Path) -> Path:
    """Give the snapshot that a cached model's main branch is at, or the only one."""
    main = cached / "refs" / "main"
    if main.is_file():
        snapshot = cached / "snapshots" / main.read_text(encoding="utf-8").strip()
        if snapshot.is_dir():
            return snapshot
    snapshots = sorted(path for path in (cached / "snapshots").iterdir() if path.is_dir())
    if len(snapshots) != 1:
        raise ValueError(
            f"a model in the hub's cache is read at its main branch, or at its only snapshot; {cached} has "
            f"{len(snapshots)} snapshots and none is marked as main; name the directory of one in {cached / 'snapshots'}"
        )
    return snapshots[0]
