"""A checkpoint directory that is there whole or not at all, and the files in one that hold no weights."""

import fnmatch
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxmoe.models import Wrapper

# Of files, and of folders with all that is in them.
_SIDE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "*.model",
    "*.jinja",
    "chat_template*",
    "additional_chat_templates",
    "encoding",
    "*processor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
# What these say is of the whole multimodal model.
_MULTIMODAL_FILES = ("*processor_config.json", "configuration_*.py", "modeling_*.py", "*processing_*.py")


@contextmanager
def new_directory(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Give a directory under another name, which gets the name `path` if the block ends well, else is removed.

    Args:
        path: directory to be.
        overwrite: whether a checkpoint directory that is there is replaced, with all that is in it.

    Raises:
        FileExistsError: there is something at `path` that is not to be replaced.
    """
    path = Path(path).resolve()
    check_free(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    partial = path.with_name(f".{path.name}.partial-{token}")
    partial.mkdir()
    try:
        yield partial
        put_in_place(partial, path, overwrite=overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path, *, overwrite: bool) -> None:
    """Give a directory that is complete its name.

    Args:
        partial: directory, beside the one that it is to be.
        path: name for it.
        overwrite: whether a checkpoint directory of that name is replaced.

    Raises:
        FileExistsError: there is something at `path` that is not to be replaced.
    """
    check_free(path, overwrite)
    if not path.exists():
        partial.rename(path)
        return
    replaced = path.with_name(f".{path.name}.replaced-{uuid.uuid4().hex[:8]}")
    path.rename(replaced)
    try:
        partial.rename(path)
    except BaseException:
        replaced.rename(path)
        raise
    shutil.rmtree(replaced)


def copy_side_files(
    source: Path,
    directory: Path,
    *,
    dtype: str | None,
    wrapper: Wrapper | None = None,
    quantization: Mapping[str, Any] | None = None,
    weights: Collection[str] = (),
    vocab_size: int | None = None,
) -> list[str]:
    """Copy ``config.json``, the tokenizer and the like.

    Args:
        source: a checkpoint directory.
        directory: directory that gets the copies.
        dtype: type of the weights beside the copy, by name; None where it is that of the source.
        wrapper: the multimodal model of which the copy is to be the text part; None where it is to be all of it.
        quantization: block of settings of quantized weights; None where the weights are plain.
        weights: names of the files of weights, which are written anew.
        vocab_size: size of the vocabulary; None where it is that of the source.

    Returns:
        Names of what is left out: other files and folders that are not hidden, such as a README or weights of another kind.
    """
    raw = (source / "config.json").read_text(encoding="utf-8")
    config = json.loads(raw)
    text_part = config if wrapper is None else wrapper.text_config(config)
    changed = _without_quantization(_with_dtype(text_part, dtype))
    changed |= {} if quantization is None else {"quantization_config": quantization}
    changed |= {} if vocab_size is None else {"vocab_size": vocab_size}
    # Byte for byte where nothing is different: numbers and key order are the author's.
    text = raw if changed == config else json.dumps(changed, indent=2, ensure_ascii=False) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    left_out = []
    for path in sorted(source.iterdir()):
        name = path.name
        if name == "config.json" or name in weights or name.endswith(".index.json") or name.startswith("."):
            continue
        if not _matches(name, _SIDE_FILES) or (wrapper and _matches(name, _MULTIMODAL_FILES)):
            left_out.append(name)
        elif path.is_dir():
            shutil.copytree(path, directory / name)
        elif path.is_file():  # and no link that leads nowhere
            shutil.copyfile(path, directory / name)
    return left_out


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_free(path: Path, overwrite: bool) -> None:
    """Refuse a name for a new directory that is taken, by anything but an empty directory or a checkpoint to replace.

    Raises:
        FileExistsError: it is.
    """
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"a checkpoint is written to a new directory; {path} is there; overwrite replaces it")
    if not (path / "config.json").is_file():
        raise FileExistsError(
            f"overwrite replaces a checkpoint, with all that is in its directory; {path} has no config.json and so is "
            "none; name another directory, or remove this one"
        )


def _with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """`config` naming `dtype`, under the keys that name one now, in the text part of a multimodal config too."""
    if dtype is None:
        return config
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    result: dict[str, Any] = {**config, **dict.fromkeys(keys, dtype)}
    text = config.get("text_config")
    if isinstance(text, dict):
        result["text_config"] = _with_dtype(text, dtype)
    elif not keys:
        result["dtype"] = dtype
    return result


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """`config` of the weights as they are on a mesh: plain floats, whatever they were read from."""
    kept = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if isinstance(kept.get("text_config"), dict):
        kept["text_config"] = _without_quantization(kept["text_config"])
    return kept
