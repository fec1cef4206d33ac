"""Parts of a run's record: what decides its output, and what it ran on."""

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import jax

from jaxmoe.batches.fingerprint import checkpoint_hash, file_hash
from jaxmoe.models import Decoder

_PACKAGES = ("jaxmoe", "jax", "jaxlib", "flax", "numpy", "tokenizers", "llguidance")


def input_part(path: Path) -> dict[str, Any]:
    """The input file: where it is, and a hash of all of it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"the input file {path} does not exist, or is none that can be read again after a restart"
        )
    digest, size = file_hash(path)
    return {"path": str(path), "sha256": digest, "bytes": size}


def checkpoint_part(source: Path | None) -> dict[str, Any] | None:
    """The checkpoint: where it is, and a hash of what `checkpoint_hash` covers; None for a model that comes from none."""
    return None if source is None else {"path": str(source), "hash": checkpoint_hash(source)}


def model_part(model: Decoder) -> dict[str, Any]:
    """The model that was made of the checkpoint, as far as it decides the text in float32."""
    report = model.load_report
    merged = None if report is None or report.adapter is None else report.adapter.path
    held = {} if report is None else {name: one.path for name, one in report.adapters.items()}
    return {
        "dtype": str(model.dtype),
        "weights": None if report is None else report.held,
        "merged_adapter": None if merged is None else checkpoint_hash(Path(merged)),
        "adapters": {name: checkpoint_hash(Path(held[name])) if name in held else None for name in model.adapters},
    }


def environment(model: Decoder) -> dict[str, Any]:
    """The versions, devices and layout of this process, which decide rounding and speed."""
    device = model.mesh.devices.flat[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "devices": {"platform": device.platform, "kind": device.device_kind, "count": model.mesh.size},
        "processes": jax.process_count(),
        "mesh": dict(model.mesh.shape),
        "dispatch": str(model.dispatch),
        "kernels": model.kernels,
        "placement": _placement(model),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _placement(model: Decoder) -> Any:
    """The placement of all layers where they have one, else a list."""
    layers = [json.loads(placement.to_json()) for placement in model.placements]
    return layers[0] if layers and all(layer == layers[0] for layer in layers) else layers
