"""The check that a model has room on its devices, before any of it is read."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, abstract_model, pack_model
from jaxmoe.layers import param_specs
from jaxmoe.mesh import AXES, bytes_left, write_mesh
from jaxmoe.models import Decoder
from jaxmoe.placement import ExpertPlacement

_MEMORY_OF_MACHINE = Path("/proc/meminfo")


def held_bytes(model: Decoder) -> int:
    """Bytes of a model's parameters on each device, packed or plain; every device holds as many."""
    return sum(math.prod(spec.sharding.shard_shape(spec.shape)) * spec.dtype.itemsize for spec in param_specs(model))


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
    found: FamilyCheckpoint,
    *,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
    expert_axes: tuple[str, ...],
    keep: bool,
) -> None:
    """Refuse a model whose parameters have no room on the devices of this process.

    Args:
        model: model without values, its parameters packed where they are to be.
        found: checkpoint that it would be read from.
        placement, expert_axes: arguments of `jaxmoe.load`, for meshes that are proposed.
        keep: whether quantized weights stay packed.

    Raises:
        CheckpointError: with the bytes of both, and meshes on which there would be room.
    """
    mesh, needed = model.mesh, held_bytes(model)
    room = {device: free_bytes(device) for device in mesh.local_devices}
    known = {device: size for device, size in room.items() if size is not None}
    if not known or needed <= min(known.values()):
        return
    device, size = min(known.items(), key=lambda one: one[1])
    way_out = next(_meshes_with_room(model, found, placement, expert_axes, keep, size), None)
    raise CheckpointError(
        f"{found.checkpoint.path}: a model's parameters have to fit in the free memory of each device; on "
        f"{write_mesh(mesh.shape)} each holds {_gigabytes(needed)}, and {device} has {_gigabytes(size)} free; "
        + (
            way_out
            or "they fit on no mesh of up to 64 times as many devices like it: free its memory, or take larger ones"
        )
        + ". `jaxmoe plan` counts a cache too, for any mesh and kind of device"
    )


def _meshes_with_room(
    model: Decoder,
    found: FamilyCheckpoint,
    placement: str | ExpertPlacement | Sequence[str | ExpertPlacement],
    expert_axes: tuple[str, ...],
    keep: bool,
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
            except ValueError:  # tp does not divide
                continue
            if keep:
                pack_model(other, found.onto({spec.path: spec for spec in param_specs(other)}))
            if (needed := held_bytes(other)) <= room:
                yield f"{write_mesh(sizes)} would take {_gigabytes(needed)} on each of {model.mesh.size * factor} devices"


def _shapes(devices: int) -> Iterator[dict[str, int]]:
    """Meshes of so many devices with dp=1, those with more experts apart first."""
    for tp, ep in itertools.product(range(1, devices + 1), repeat=2):
        if tp * ep == devices:
            yield dict(zip(AXES, (1, tp, ep), strict=True))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
