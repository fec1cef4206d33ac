"""Routing traces as other programs record them, one file a format, and `read_trace` for any of them."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmoe.placement.trace import RoutingTrace, is_trace_file, read_npz
from jaxmoe.placement.trace_formats.megatron import from_megatron, read_jsonl
from jaxmoe.placement.trace_formats.sglang import from_sglang
from jaxmoe.placement.trace_formats.vllm import from_vllm

__all__ = ["from_megatron", "from_sglang", "from_vllm", "read_trace"]


def read_trace(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    num_experts: int | None = None,
    window: int = 1024,
    read_torch: Callable[[Path], Any] | None = None,
) -> RoutingTrace:
    """Read a trace, its format told by the suffix.

    ======  ==========================================================================
    .npz    jaxmoe's own (`RoutingTrace.save`), one after the other, or vLLM's `routed_experts` arrays
    .npy    one vLLM `routed_experts` array
    .jsonl  Megatron-LM's router trace, one file a rank
    .pt     SGLang's expert distribution recorder, one file a rank
    ======  ==========================================================================

    Args:
        paths: a file, or the files of one recording (same suffix).
        num_experts: E, which vLLM's and Megatron-LM's files do not say.
        window: tokens per window where the format has no steps (vLLM).
        read_torch: function that reads a .pt file into nested dicts, lists and arrays.

    Raises:
        ValueError: the suffix is unknown, the files do not belong together, or one does not fit its format.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [Path(path) for path in given]
    suffixes = {file.suffix for file in files}
    if len(suffixes) != 1:
        raise ValueError(f"the files of one recording have the same suffix; got {sorted(map(str, files)) or 'no file'}")
    suffix = suffixes.pop()
    if suffix == ".jsonl":
        records = (record for file in files for record in read_jsonl(file))
        return from_megatron(records, num_experts=_needed(num_experts, "Megatron-LM's router trace"))
    if suffix == ".pt":
        if read_torch is None:
            raise ValueError(f"{files[0]} is a torch file: pass read_torch, a function that reads one into arrays")
        return from_sglang([read_torch(file) for file in files])
    if suffix == ".npz":
        contents = [read_npz(file) for file in files]
        if all(map(is_trace_file, contents)):
            return RoutingTrace.joined([RoutingTrace.load(file) for file in files])
        own = [file for file, fields in zip(files, contents, strict=True) if is_trace_file(fields)]
        if own:
            raise ValueError(
                f"the files of one recording are of one format: {own[0]} is jaxmoe's own, and others are not"
            )
        arrays = [array for fields in contents for _, array in sorted(fields.items(), key=_by_number)]
        return from_vllm(arrays, num_experts=_needed(num_experts, "vLLM's routed_experts"), window=window)
    if suffix == ".npy":
        arrays = [_read_npy(file) for file in files]
        return from_vllm(arrays, num_experts=_needed(num_experts, "vLLM's routed_experts"), window=window)
    raise ValueError(f"traces are .npz, .npy, .jsonl or .pt files; got {files[0]}")


def _needed(num_experts: int | None, what: str) -> int:
    if num_experts is None:
        raise ValueError(f"{what} does not say how many experts the model has: pass num_experts (--num-experts)")
    return num_experts


def _by_number(item: tuple[str, np.ndarray]) -> list[str | int]:
    """Sort ``arr_10`` after ``arr_2``: what is between numbers as text, and numbers as numbers."""
    parts = re.split(r"(\d+)", item[0])
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def _read_npy(file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is damaged or is no .npy array: {error}") from error
