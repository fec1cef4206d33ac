"""A checkpoint, and the same model as Orbax arrays, loaded in turns: from the page cache, and from the disk."""

import gc
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

import jaxmoe
from jaxmoe.models import Decoder

PLACEMENT = "round_robin"


def compare_restores(original: Path, scratch: Path, mesh: Mesh, repeats: int) -> dict:
    """Load a checkpoint in each form `repeats` times, cold and warm, in turns.

    Args:
        original: checkpoint of files of tensors.
        scratch: directory for the other forms.
        mesh: mesh to load onto; experts are placed round robin, so that the order in the files is none of the devices'.
        repeats: loads in each way, of which the medians are compared.

    Returns:
        Bytes of each form, {way: {"cold": GB/s of the model's bytes, "warm": ...}}, the medians' ratios to the original, and
        the time of the conversion.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    start = time.perf_counter()
    jaxmoe.convert_to_orbax(original, scratch / "orbax")
    converted = time.perf_counter() - start
    model = load(original, mesh)
    nbytes = model.load_report.bytes_needed
    directories = {"original": original, "jaxmoe.load of Orbax arrays": scratch / "orbax"}
    ways: dict[str, Callable[[], Decoder]] = {
        name: lambda path=path: load(path, mesh) for name, path in directories.items()
    }
    # The arrays as jaxmoe writes them, and as Orbax does where it is asked for nothing else.
    for name, path in {
        "Orbax, the same arrays": scratch / "orbax" / "weights",
        "Orbax, as it saves by itself": scratch / "standard",
        "Orbax, OCDBT uncompressed": scratch / "ocdbt",
    }.items():
        directories[name] = path
        ways[name] = lambda path=path: restore(path, model)
    state = jaxmoe.logical_state(model)
    save(scratch / "standard", state)
    save(scratch / "ocdbt", state, use_compression=False)
    check_alike(ways, model)
    seconds: dict[str, dict[str, list[float]]] = {name: {"cold": [], "warm": []} for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            for cache in ("cold", "warm"):
                if cache == "cold":
                    drop(directories[name])
                gc.collect()
                begin = time.perf_counter()
                loaded = way()
                seconds[name][cache].append(time.perf_counter() - begin)
                del loaded
    medians = {name: {cache: statistics.median(times) for cache, times in own.items()} for name, own in seconds.items()}
    first = medians["original"]
    return {
        "bytes": {name: size_of(path) for name, path in directories.items()},
        "repeats": repeats,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "seconds_to_convert": round(converted, 2),
        "gigabytes_per_second": {
            name: {cache: round(nbytes / own[cache] / 1e9, 2) for cache in own} for name, own in medians.items()
        },
        "time_over_the_original": {
            name: {cache: round(own[cache] / first[cache], 2) for cache in own} for name, own in medians.items()
        },
    }


def load(path: Path, mesh: Mesh) -> Decoder:
    """All of `jaxmoe.load`, until every array is there."""
    model = jaxmoe.load(path, mesh=mesh, placement=PLACEMENT)
    assert model.load_report.bytes_read == model.load_report.bytes_needed
    return model


def save(path: Path, state: dict[str, jax.Array], **options: bool) -> None:
    """Save a state as Orbax does, from the mesh that it is on."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(state))
    os.sync()


def restore(path: Path, like: Decoder) -> Decoder:
    """What people do with Orbax: restore the logical state onto the mesh, and put it into the model."""
    target = jaxmoe.abstract_logical_state(like)
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(path, target)
    jaxmoe.load_logical_state(like, state)
    jax.block_until_ready([param.get_value() for param in jaxmoe.layers.params_by_path(like).values()])
    return like


def check_alike(ways: dict[str, Callable[[], Decoder]], model: Decoder) -> None:
    """A load that is quick and wrong is not measured."""
    names = ("embed.weight", "layers.0.moe.w_gate_up", "layers.0.moe.w_down")
    expected = {name: np.asarray(jaxmoe.layers.params_by_path(model)[name].get_value()) for name in names}
    for way in ways.values():
        found = jaxmoe.layers.params_by_path(way())
        for name, array in expected.items():
            assert np.asarray(found[name].get_value()).tobytes() == array.tobytes(), name


def drop(path: Path) -> None:
    """Take the files of a checkpoint out of the page cache."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def size_of(path: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def as_text(result: dict) -> str:
    """A line for each way."""
    lines = [
        f"{result['bytes']['original'] / 1e9:.2f} GB, converted in {result['seconds_to_convert']} s; medians of "
        f"{result['repeats']}, {result['cores']} cores, jax {result['jax']}",
        f"{'':32}{'on disk':>10}{'cold GB/s':>12}{'warm GB/s':>12}{'time over the original, cold':>32}{'warm':>8}",
    ]
    for name, rates in result["gigabytes_per_second"].items():
        ratio = result["time_over_the_original"][name]
        lines.append(
            f"{name:32}{result['bytes'][name] / 1e9:>10.2f}{rates['cold']:>12.2f}{rates['warm']:>12.2f}"
            f"{ratio['cold']:>32.2f}{ratio['warm']:>8.2f}"
        )
    return "\n".join(lines)
