"""Rates of a machine's own memory and links that were measured there, in place of those of data sheets.

`scripts/gpu_session --gpus 8` writes them, a JSON file a kind of device and number of devices; in the user's folder
(`device_rates`) "auto" goes by them:

    {"device": "NVIDIA H100 80GB HBM3", "devices": 8, "memory_bandwidth": 3.0e12, "within": 3.6e11, "latency": 1.5e-05,
        "versions": {"jax": "0.11.2", ...}, "driver": "...", "date": "2026-01-31"}
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jaxmoe.hardware import Device, Links
from jaxmoe.user_files import data_folder

_NUMBERS = ("memory_bandwidth", "within", "latency")


def rates_file(device_kind: str, devices: int, folder: Path | None = None) -> Path:
    """The file with the rates of so many devices of a kind; in the user's folder by default.

    >>> rates_file("NVIDIA H100 80GB HBM3", 8, Path("rates")).name
    'nvidia_h100_80gb_hbm3-8.json'
    """
    name = re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")
    return (data_folder() / "device_rates" if folder is None else folder) / f"{name}-{devices}.json"


def measured_rates(device_kind: str, devices: int, published: Device) -> Device | None:
    """The device with its measured rates; None where nothing was measured.

    Args:
        device_kind: kind of device, as JAX names it.
        devices: devices of the mesh.
        published: device whose rate between nodes is kept, for a machine alone cannot measure it.

    Raises:
        ValueError: the file is no such file.
    """
    return _read(rates_file(device_kind, devices), device_kind, devices, published)


@cache
def _read(file: Path, device_kind: str, devices: int, published: Device) -> Device | None:
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text())
        belongs = found["device"], found["devices"]
        memory, within, latency = (found[name] for name in _NUMBERS)
        if belongs != (device_kind, devices):
            raise ValueError(f"it was measured on {belongs[1]} of {belongs[0]!r}")
        links = Links(within=within, between=published.links.between, latency=latency)
        return Device(name=f"{device_kind}, measured", memory_bandwidth=memory, links=links)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} has no rates of {devices} devices {device_kind!r} ({error}): remove it, or measure them again with "
            f"scripts/gpu_session --gpus {devices}"
        ) from error


def write_rates(
    device_kind: str,
    devices: int,
    *,
    memory_bandwidth: float,
    links: Links,
    machine: dict[str, Any],
    folder: Path | None = None,
) -> Path:
    """Write the rates of so many devices of a kind, whole or not at all.

    Args:
        device_kind: kind of device, as JAX names it.
        devices: devices that took part.
        memory_bandwidth: bytes per second of a device's memory.
        links: speed within the node, and latency.
        machine: versions and whatever else the figures belong to.
        folder: folder of the file; the user's by default.

    Returns:
        The file.
    """
    device = Device(name=device_kind, memory_bandwidth=memory_bandwidth, links=links)
    rates = {"memory_bandwidth": device.memory_bandwidth, "within": links.within, "latency": links.latency}
    file = rates_file(device_kind, devices, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"device": device_kind, "devices": devices} | rates | machine, indent=1) + "\n")
    unfinished.replace(file)
    _read.cache_clear()
    return file
