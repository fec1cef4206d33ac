"""`jaxmoe.convert_to_orbax`: a checkpoint as Orbax arrays in logical order, which any mesh and placement reads by range."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmoe import __version__
from jaxmoe.checkpoint.boxes import Box
from jaxmoe.checkpoint.formats import (
    DTYPE_NAMES,
    PLACEMENT,
    VERSION,
    StoredArray,
    open_files,
    read_description,
)
from jaxmoe.checkpoint.mapping import FamilyCheckpoint
from jaxmoe.checkpoint.saving.arrays import ChunkLog, write_array, write_tree
from jaxmoe.checkpoint.saving.directory import check_free, copy_side_files, put_in_place
from jaxmoe.checkpoint.saving.layout import ArrayLayout
from jaxmoe.checkpoint.saving.values import CheckpointValues
from jaxmoe.checks import flag, path_like
from jaxmoe.config import CONVERTING, STORED, MoEConfig, directory_of, find_checkpoint, partial_directory
from jaxmoe.placement import ExpertPlacement, placements_to_json
from jaxmoe.progress import ProgressCallback, byte_progress, check_progress
from jaxmoe.quant.packing import Packing


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrbaxReport:
    """The arrays and bytes that a conversion to Orbax wrote.

    Attributes:
        path: directory of the checkpoint.
        arrays: number of arrays; a packed parameter has several.
        bytes_written: bytes of all arrays.
        bytes_kept: bytes of those chunks that an interrupted conversion had written before.
        largest_chunk: bytes of the largest chunk, of which one at a time is in host memory.
        dtypes: {element type: bytes}, as safetensors names them.
        packed: {packed form: parameters in it}.
        ignored: {rule: tensors of the source that are not in the checkpoint}.
        left_out: files and folders of the source that are not in the copy. The tokenizer and chat templates always are.
        sha256: digest of all arrays: of their names, shapes, dtypes and contents.
        seconds: wall-clock time.
        notes: sentences about quantized weights that are stored as plain numbers.
    """

    path: str
    arrays: int
    bytes_written: int
    bytes_kept: int
    largest_chunk: int
    dtypes: dict[str, int]
    packed: dict[str, int]
    ignored: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...]
    sha256: str
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain types, for JSON."""
        return dataclasses.asdict(self)


def convert_to_orbax(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    placement: ExpertPlacement | Sequence[ExpertPlacement] | None = None,
    mtp: bool = False,
    overwrite: bool = False,
    progress: bool | ProgressCallback = False,
) -> OrbaxReport:
    """Write a checkpoint as an Orbax checkpoint of a model's parameters, with config.json, tokenizer and digests.

    The arrays are those of `jaxmoe.logical_state`: experts in order, without padding or replicas, so any mesh and placement
    reads its ranges of them. `jaxmoe.load` does, and so does Orbax. Quantized weights are stored packed where one device
    would hold them so. No device is used, and one chunk of an array at a time is in host memory.

    The directory appears when all of it is written. Until then ``DIRECTORY.partial`` has what is there; the same call
    again goes on where it was interrupted, and one with other arguments begins anew.

    Args:
        source: a checkpoint, given as for `jaxmoe.load`.
        directory: directory to make.
        dtype: type of plain weights; None leaves each its own. What a model holds in float32 stays as it is.
        placement: placement of all MoE layers, or one for each, to keep with the checkpoint for
            ``jaxmoe.load(placement="checkpoint")``; the arrays are the same with any.
        mtp: whether layers for multi-token prediction are stored too.
        overwrite: whether a checkpoint that is there is replaced, with all that is in its directory.
        progress: True draws a bar on stderr; a callable is given (bytes done, bytes in all).

    Returns:
        A report of what was written.

    Raises:
        BlockingIOError: another process converts to the directory.
        FileExistsError: there is something in the way.
        FileNotFoundError: `source` or a part of it is missing.
        OSError: there is not enough room on the disk.
        ValueError: the checkpoint cannot be loaded as it is, or an argument is none of those above.

    Example:
        >>> report = jaxmoe.convert_to_orbax("demo", "demo-orbax")
        >>> model = jaxmoe.load("demo-orbax", mesh=jaxmoe.make_mesh(ep=8))
    """
    path_like("source", source)
    path_like("directory", directory)
    check_progress(progress)
    mtp, overwrite = flag("mtp", mtp), flag("overwrite", overwrite)
    began, target = time.perf_counter(), _target(dtype)
    source, directory = find_checkpoint(source), Path(directory).resolve()
    if directory_of(source).resolve().is_relative_to(directory):
        raise ValueError(
            f"a checkpoint is not written over a directory that its source is in; {source} is in {directory}; name a "
            "directory beside it"
        )
    check_free(directory, overwrite)
    found = FamilyCheckpoint.open(source, mtp=mtp)
    layout = ArrayLayout.of(found, target)
    placements = _placements(found, placement)
    partial = partial_directory(directory)
    partial.mkdir(parents=True, exist_ok=True)
    job = _job(found, layout, placements)
    if (
        (partial / STORED).is_file()
        and not (partial / CONVERTING).is_file()
        and read_description(partial)["job"] == job
    ):
        # The process was killed between its last two steps.
        put_in_place(partial, directory, overwrite=overwrite)
        return _report(directory, layout, layout.nbytes, time.perf_counter() - began)
    log = ChunkLog(partial, job)
    try:
        kept = layout.bytes_of(log.digests)
        _check_room(partial, layout.nbytes - kept)
        arrays = _write_arrays(partial, layout, log, progress)
        write_tree(partial, arrays)
        left_out = _write_side_files(found, partial, layout, placements)
        _describe(partial, layout, arrays, job, left_out)
        log.finish()
    finally:
        log.close()
    put_in_place(partial, directory, overwrite=overwrite)
    return _report(directory, layout, kept, time.perf_counter() - began)


def _target(dtype: str | None) -> np.dtype | None:
    if dtype is None:
        return None
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is float32, bfloat16 or float16, or None to leave it as it is; got {dtype!r}")
    return np.dtype(jnp.dtype(dtype))


def _placements(
    found: FamilyCheckpoint, placement: ExpertPlacement | Sequence[ExpertPlacement] | None
) -> list[ExpertPlacement] | None:
    """One placement for each MoE layer.

    Raises:
        ValueError: there are as many as there are layers in no way, or one is of another number of experts.
    """
    if placement is None:
        return None
    config, layers = found.config, found.config.moe_layers
    own = [placement] * len(layers) if isinstance(placement, ExpertPlacement) else list(placement)
    if len(own) != len(layers) or not all(isinstance(one, ExpertPlacement) for one in own):
        raise ValueError(
            f"a checkpoint keeps one ExpertPlacement, or one for each of its {len(layers)} MoE layers; got {len(own)} of "
            f"{', '.join(sorted({type(one).__name__ for one in own}))}"
        )
    for layer, one in zip(layers, own, strict=True):
        moe = config.layers[layer].feed_forward
        assert isinstance(moe, MoEConfig)
        if one.num_experts != moe.num_experts:
            raise ValueError(
                f"layer {layer} has {moe.num_experts} experts, and its placement is of {one.num_experts}; make "
                "one of as many"
            )
    return own


def _job(found: FamilyCheckpoint, layout: ArrayLayout, placements: Sequence[ExpertPlacement] | None) -> dict[str, Any]:
    """Describe what is converted: a conversion goes on where one of the same was interrupted."""
    config = directory_of(found.checkpoint.path) / "config.json"
    arrays = [(array.path, array.shape, array.dtype.name, array.rows) for array in layout.arrays.values()]
    return {
        "jaxmoe": __version__,
        "source": str(found.checkpoint.path.resolve()),
        "files": [[file.path.name, file.size, file.mtime_ns] for file in found.checkpoint.files],
        "config": hashlib.sha256(config.read_bytes()).hexdigest(),
        "arrays": hashlib.sha256(json.dumps(arrays).encode()).hexdigest(),
        "placements": hashlib.sha256(placements_to_json(placements or []).encode()).hexdigest(),
    }


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"the arrays take {needed:,} bytes more, and {directory.parent} has {free:,} free; name another disk"
        )


def _write_arrays(
    directory: Path, layout: ArrayLayout, log: ChunkLog, progress: bool | ProgressCallback
) -> list[StoredArray]:
    done, written = 0, []
    with (
        open_files(layout.found.checkpoint.files) as descriptors,
        byte_progress(f"writing {directory.name.removesuffix('.partial')}", progress) as on_bytes,
    ):
        values = CheckpointValues(layout.mapped, descriptors)

        def count(size: int) -> None:
            nonlocal done
            done += size
            if on_bytes is not None:
                on_bytes(done, layout.nbytes)

        for path, array in layout.arrays.items():

            def read(box: Box, path: str = path, dtype: np.dtype = array.dtype) -> np.ndarray:
                return values.read(path, box).astype(dtype, copy=False)

            digests = write_array(directory, array, read, log, count)
            written.append(dataclasses.replace(array, digests=digests))
    return written


def _write_side_files(
    found: FamilyCheckpoint, directory: Path, layout: ArrayLayout, placements: Sequence[ExpertPlacement] | None
) -> list[str]:
    source = directory_of(found.checkpoint.path)
    own = json.loads((source / "config.json").read_text(encoding="utf-8"))
    named = (own if found.family.wrapper is None else found.family.wrapper.text_config(own)).keys() & {
        "dtype",
        "torch_dtype",
    }
    changed = not named or found.config.dtype != layout.dtype.name
    left_out = copy_side_files(
        source,
        directory,
        dtype=layout.dtype.name if changed else None,
        wrapper=found.family.wrapper,
        weights={file.path.name for file in found.checkpoint.files},
    )
    if placements is not None:
        (directory / PLACEMENT).write_text(placements_to_json(placements), encoding="utf-8")
    return left_out


def _describe(
    directory: Path, layout: ArrayLayout, arrays: Sequence[StoredArray], job: Mapping[str, Any], left_out: Sequence[str]
) -> None:
    """Write the file that the checkpoint is known by, once all else is on the disk."""
    side = sorted(path for path in directory.iterdir() if path.is_file() and path.name != CONVERTING)
    listed = {array.path: array.to_dict() for array in arrays}
    description = {
        "version": VERSION,
        "jaxmoe": __version__,
        "tied": layout.found.config.tie_word_embeddings,
        "mtp": len(layout.found.config.layers) > layout.found.config.num_main_layers,
        "parameters": {path: _parameter(layout, path, packing) for path, packing in layout.parameters.items()},
        "arrays": listed,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in side},
        "sha256": hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest(),
        "left_out": list(left_out),
        "job": job,
    }
    with open(directory / STORED, "w", encoding="utf-8") as file:
        json.dump(description, file)
        file.flush()
        os.fsync(file.fileno())


def _parameter(layout: ArrayLayout, path: str, packing: Packing | None) -> dict[str, Any] | None:
    if packing is None:
        return None
    return {"packing": dataclasses.asdict(packing), "roles": layout.roles[path], "activations": layout.asked[path]}


def _report(directory: Path, layout: ArrayLayout, kept: int, seconds: float) -> OrbaxReport:
    dtypes: Counter[str] = Counter()
    for array in layout.arrays.values():
        dtypes[DTYPE_NAMES[array.dtype]] += array.nbytes
    chunks = [
        int(np.prod(array.chunk_shape, dtype=np.int64)) * array.dtype.itemsize for array in layout.arrays.values()
    ]
    description = read_description(directory)
    packed = Counter(
        dataclasses.replace(form, activations=None).describe() for form in layout.parameters.values() if form
    )
    return OrbaxReport(
        path=str(directory),
        arrays=len(layout.arrays),
        bytes_written=layout.nbytes,
        bytes_kept=kept,
        largest_chunk=max(chunks),
        dtypes=dict(dtypes),
        packed=dict(packed),
        ignored=layout.ignored,
        left_out=tuple(description["left_out"]),
        sha256=description["sha256"],
        seconds=seconds,
        notes=layout.notes,
    )
