"""The check that a model has room on its devices, before any of it is read."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.loading.apart import plan_factors
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, MappedCheckpoint, abstract_model
from jaxmoe.hardware import JAX_TAKES
from jaxmoe.layers import ParamSpec, param_specs
from jaxmoe.mesh import AXES, bytes_left, write_mesh
from jaxmoe.models import Decoder
from jaxmoe.placement import ExpertPlacement

Pack = Callable[[Decoder, MappedCheckpoint], Any]
"""A function that makes parameters of a model without values packed ones, given a checkpoint mapped to them as plain."""

_MEMORY_OF_MACHINE = Path("/proc/meminfo")


def held_bytes(model: Decoder, factors: Iterable[ParamSpec] = ()) -> int:
    """Bytes of a model's parameters, packed or plain, and of adapters' factors on each device; every one holds as many."""
    return sum(spec.device_bytes for spec in (*param_specs(model), *factors))


def free_bytes(device: jax.Device) -> int | None:
    """Bytes that a device can still give to arrays; None where it does not tell.

    A simulated device has its share of the machine's memory that no process has taken.
    """
    if (left := bytes_left(device)) is not None:
        return left
    if device.platform == "cpu" and _MEMORY_OF_MACHINE.exists():
        lines = dict(line.split(":") for line in _MEMORY_OF_MACHINE.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 // len(device.client.local_devices())
    return None


def check_room(
    model: Decoder,
    factors: Iterable[ParamSpec],
    found: FamilyCheckpoint,
    *,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
    expert_axes: tuple[str, ...],
    adapters: Mapping[str, str | Path],
    pack: Pack,
) -> None:
    """Refuse a model whose parameters, with adapters beside them, have no room on the devices of this process.

    Args:
        model: model without values, its parameters packed where they are to be.
        factors: specs of the factors of its adapters.
        found: checkpoint that it would be read from.
        placement, expert_axes, adapters: arguments of `jaxmoe.load`, for meshes that are proposed.
        pack: function that packed the model's parameters, for the same.

    Raises:
        CheckpointError: with the bytes of both, and meshes on which there would be room.
    """
    mesh, needed = model.mesh, held_bytes(model, factors)
    room = {device: free_bytes(device) for device in mesh.local_devices}
    known = {device: size for device, size in room.items() if size is not None}
    if not known or needed <= min(known.values()):
        return
    device, size = min(known.items(), key=lambda one: one[1])
    way_out = next(_meshes_with_room(model, found, placement, expert_axes, adapters, pack, size), None)
    what = "parameters and adapters" if adapters else "parameters"
    raise CheckpointError(
        f"{found.checkpoint.path}: a model's {what} have to fit in the free memory of each device; on "
        f"{write_mesh(mesh.shape)} each holds {_gigabytes(needed)}, and {device} has {_gigabytes(size)} free; "
        + (
            way_out
            or "they fit on no mesh of up to 64 times as many devices like it: free its memory, or take larger ones"
        )
        + _jax_takes(device.platform)
        + ". `jaxmoe plan` counts a cache too, for any mesh and kind of device"
    )


def _jax_takes(platform: str) -> str:
    """Say that memory which seems to be missing may be what JAX leaves."""
    if platform != "gpu":
        return ""
    return f"; of a GPU's memory JAX takes {JAX_TAKES:.0%} unless XLA_CLIENT_MEM_FRACTION says more, as 0.95"


def _meshes_with_room(
    model: Decoder,
    found: FamilyCheckpoint,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
    expert_axes: tuple[str, ...],
    adapters: Mapping[str, str | Path],
    pack: Pack,
    room: int,
) -> Iterator[str]:
    """Meshes on which each device has room for its part, those of as many devices first."""
    if not isinstance(placement, str):
        placement = "linear"  # one that was made for the experts' own number of devices fits no other
    for factor in (1, 2, 4, 8, 16, 32, 64):
        for sizes in _shapes(model.mesh.size * factor):
            try:
                other = abstract_model(
                    found.config, sizes=sizes, placement=placement, expert_axes=expert_axes, dtype=model.dtype
                )
                mapped = found.onto({spec.path: spec for spec in param_specs(other)})
                factors = plan_factors(other, adapters, mapped, found.family)
                pack(other, mapped)
            except ValueError:  # tp does not divide, or cuts what is packed together
                continue
            if (needed := held_bytes(other, factors)) <= room:
                yield f"{write_mesh(sizes)} would take {_gigabytes(needed)} on each of {model.mesh.size * factor} devices"


def _shapes(devices: int) -> Iterator[dict[str, int]]:
    """Meshes of so many devices with dp=1, those with more experts apart first."""
    for tp, ep in itertools.product(range(1, devices + 1), repeat=2):
        if tp * ep == devices:
            yield dict(zip(AXES, (1, tp, ep), strict=True))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
