"""The origin of each region of a parameter on a new mesh: shards of the same parameter on the old one.

Both sides are described by a `ParamSpec`, whose `rows` say which part of the checkpoint's tensor each group
of dim 0 holds. Experts that change slots, key/value heads copied for a wider tp, and padding
are all this: row i of the new array is the row of the old one that holds the same source row.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import jax
import numpy as np

from jaxmoe.checkpoint.boxes import Box, box_of, intersect, runs
from jaxmoe.layers.param import ParamSpec

_ZEROS = -1


@dataclasses.dataclass(frozen=True)
class Piece:
    """A region of a new shard, and the old shard that has it.

    Attributes:
        source: device that holds it.
        source_start: its first element, counted from the old shard's corner.
        start: its first element, counted from the new shard's corner.
        shape: its extent.
    """

    source: jax.Device
    source_start: tuple[int, ...]
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass
class Relocation:
    """The way of one parameter to its new devices.

    Attributes:
        pieces: pieces that the shard of each new device is made of; the rest of it is zeros.
        boxes: region of the parameter that each new device holds.
        lost: rows of dim 0 of the new array of which some element has no surviving holder.
    """

    pieces: dict[jax.Device, list[Piece]]
    boxes: dict[jax.Device, Box]
    lost: frozenset[int]


def plan_relocation(old: ParamSpec, new: ParamSpec, lost_devices: Collection[jax.Device] = ()) -> Relocation:
    """Find a holder for every region of a parameter's new shards.

    A region that the device holds already stays there; of several other holders the one of the lowest id gives it.

    Args:
        old: parameter as it is.
        new: parameter as it is to be.
        lost_devices: devices whose memory is gone.
    """
    source_old, source_new = source_rows(old), source_rows(new)
    boxes, holders = device_boxes(new), _holders(old)
    relocation = Relocation({device: [] for device in boxes}, boxes, frozenset())
    lost: set[int] = set()
    for device, box in boxes.items():
        at = _old_rows(source_old, holders, device, lost_devices)
        rows = source_new[box[0][0] : box[0][1]] if box else np.zeros(1, np.int64)
        old_rows = np.where(rows < 0, _ZEROS, at[np.maximum(rows, 0)])
        for first, start, count in runs(old_rows):
            if start == _ZEROS:
                continue
            wanted = ((start, start + count), *box[1:]) if box else ()
            for part, source in _parts(wanted, holders, device, lost_devices):
                held = _intersection(part, wanted)
                offset = [a - corner for (a, _), (corner, _) in zip(held, wanted, strict=True)]
                piece_start = (*[first + offset[0] for _ in box[:1]], *offset[1:])
                shape = tuple([b - a for a, b in held])
                if source is None:
                    corner = box[0][0] + piece_start[0] if box else 0
                    lost.update(range(corner, corner + (shape[0] if box else 1)))
                    continue
                source_start = tuple([a - corner for (a, _), (corner, _) in zip(held, part, strict=True)])
                relocation.pieces[device].append(Piece(source, source_start, piece_start, shape))
    return dataclasses.replace(relocation, lost=frozenset(lost))


def source_rows(spec: ParamSpec) -> np.ndarray:
    """int64 [size of dim 0], the row of the checkpoint's tensor that each row of the parameter is, -1 for zeros."""
    if not spec.shape:
        return np.zeros(1, np.int64)
    if spec.rows is None:
        return np.arange(spec.shape[0])
    group = spec.shape[0] // len(spec.rows)
    rows = np.asarray(spec.rows, np.int64)
    return np.where(rows[:, None] < 0, -1, rows[:, None] * group + np.arange(group)).reshape(-1)


def device_boxes(spec: ParamSpec) -> dict[jax.Device, Box]:
    """The region of a parameter that each of its devices holds."""
    places = spec.sharding.devices_indices_map(spec.shape)
    return {device: box_of(index, spec.shape) for device, index in places.items()}


def _holders(spec: ParamSpec) -> dict[Box, list[jax.Device]]:
    holders: dict[Box, list[jax.Device]] = {}
    for device, box in sorted(device_boxes(spec).items(), key=lambda item: item[0].id):
        holders.setdefault(box, []).append(device)
    return holders


def _old_rows(
    source_old: np.ndarray,
    holders: Mapping[Box, Sequence[jax.Device]],
    device: jax.Device,
    lost_devices: Collection[jax.Device],
) -> np.ndarray:
    """For each source row the old row to take it from: on `device` where it is there, else on any that survived."""

    def distance(box: Box) -> int:
        alive = [holder for holder in holders[box] if holder not in lost_devices]
        return 0 if device in alive else 1 if alive else 2

    ranges: dict[tuple[int, int], int] = {}
    for box in holders:
        rows = box[0] if box else (0, 1)
        # With dim 0 split by one axis and another dim by a second, a row is as far as the nearest part of it ...
        ranges[rows] = min(ranges.get(rows, 2), distance(box))
        # ... and gone as soon as any part of it is.
        if distance(box) == 2:
            ranges[rows] = 2
    at = np.full(source_old.max() + 1, _ZEROS, np.int64)
    # The farthest first, so that nearer ones overwrite it.
    for (start, stop), _ in sorted(ranges.items(), key=lambda item: (-item[1], -item[0][0])):
        held = np.arange(start, stop)[source_old[start:stop] >= 0]
        at[source_old[held][::-1]] = held[::-1]
    return at


def _parts(
    wanted: Box,
    holders: Mapping[Box, Sequence[jax.Device]],
    device: jax.Device,
    lost_devices: Collection[jax.Device],
) -> list[tuple[Box, jax.Device | None]]:
    """The old shards that `wanted` lies in, and a device that has each; None where none is left."""
    parts: list[tuple[Box, jax.Device | None]] = []
    for box, devices in holders.items():
        if wanted and intersect(box, wanted) is None:
            continue
        alive = [holder for holder in devices if holder not in lost_devices]
        parts.append((box, device if device in alive else alive[0] if alive else None))
    return parts


def _intersection(a: Box, b: Box) -> Box:
    both = intersect(a, b)
    assert both is not None
    return both
