"""Facts of the GPU at hand, and of the CUDA beside it, that kernels are made by."""

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jaxmoe.hardware import GPU, GPUS, get_gpu

_LIBDEVICE = Path("nvvm/libdevice/libdevice.10.bc")
# Packages of the wheel that has it, for CUDA 13 and 12, and the folders that XLA's compiler looks into besides.
_WHEELS = ("nvidia.cu13", "nvidia.cuda_nvcc")
_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")


@cache
def multiprocessors(device_kind: str | None, otherwise: GPU = GPUS["h100"]) -> int:
    """Number of multiprocessors of a kind of device, which a persistent kernel has as many blocks of.

    GPUs of this process say it themselves, a part of one (MIG) too; those that are only compiled for are in
    `jaxmoe.hardware.GPUS`.

    Args:
        device_kind: `jax.Device.device_kind`; None for the GPU of this process, if there is one.
        otherwise: kind of GPU whose number is given where that one is neither here nor known.

    >>> multiprocessors("NVIDIA H100 PCIe"), multiprocessors("NVIDIA H20"), multiprocessors("not known")
    (114, 78, 132)
    """
    if here := [device.core_count for device in _present_gpus() if device_kind in (None, device.device_kind)]:
        return min(here)
    try:
        return otherwise.multiprocessors if device_kind is None else get_gpu(device_kind).multiprocessors
    except ValueError:
        return otherwise.multiprocessors


def _present_gpus() -> list[Any]:
    try:
        return [device for device in jax.devices("gpu") if hasattr(device, "core_count")]
    except RuntimeError:  # There is no such platform here.
        return []


def missing_libdevice() -> str:
    """The reason why Mosaic GPU's kernels do not compile here, and the way out; empty where they do.

    They are linked with CUDA's libdevice, and where it is not found the whole process is aborted. It is looked for beside
    jax's plugin and in two folders alone: CUDA_ROOT and XLA's flag for such a folder serve other programs only.
    """
    folders = [*_wheel_folders(), *map(Path, _TOOLKITS)]
    if any((folder / _LIBDEVICE).exists() for folder in folders):
        return ""
    return (
        f"they are linked with CUDA's libdevice, and {_LIBDEVICE} is in none of {', '.join(map(str, folders))}: "
        f"pip install nvidia-cuda-nvcc, or make {_TOOLKITS[0]} a link to a CUDA toolkit; for these kernels CUDA_ROOT and "
        "XLA_FLAGS do not do"
    )


def _wheel_folders() -> list[Path]:
    found = []
    for name in _WHEELS:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # There is no wheel of NVIDIA's.
            spec = None
        found += [Path(folder) for folder in (spec.submodule_search_locations or () if spec else ())]
    return found
