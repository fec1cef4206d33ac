"""Facts of the GPU at hand that kernels are made by."""

from functools import cache
from typing import Any

import jax

from jaxmoe.hardware import GPU, GPUS, get_gpu


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
