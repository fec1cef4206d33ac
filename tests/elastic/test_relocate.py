"""Where the parts of a moved parameter come from, without moving any."""

import numpy as np
import pytest

from jaxmoe.checkpoint.boxes import volume
from jaxmoe.elastic.relocate import plan_relocation
from jaxmoe.layers import ParamSpec
from jaxmoe.mesh import named
from tests.support.meshes import mesh_of

ROWS = (0, 1, 2, 3, 3, 2, 1, 0)


def spec(mesh_shape: tuple[int, int, int], *dims: str | None, rows: tuple[int, ...] = ROWS) -> ParamSpec:
    return ParamSpec(
        path="w",
        shape=(len(rows), 8),
        dtype=np.dtype(np.float32),
        sharding=named(mesh_of(*mesh_shape), *dims),
        rows=rows,
        source_groups=4,
    )


@pytest.mark.parametrize(
    ("old", "lost", "gone"),
    [
        # All have everything, and so do the rows' replicas: the first device to hold a part is lost, then all but one.
        (spec((8, 1, 1)), [0], set()),
        (spec((8, 1, 1)), range(7), set()),
        (spec((4, 1, 2), "ep"), [0, 1, 2, 3], set()),
        (spec((1, 1, 8), "ep"), [0, 1], set()),
        # Row 0 was on the first and the last device, and half of it on two devices in turn.
        (spec((1, 1, 8), "ep"), [0, 7], {0}),
        (spec((1, 2, 4), "ep", "tp"), [0, 6], {0, 1}),
    ],
)
def test_nothing_is_taken_from_a_lost_device(old, lost, gone):
    """Every element comes from a device that is left, or its row is said to be lost."""
    devices = list(old.sharding.mesh.devices.flat)
    lost_devices = [device for device in devices if device.id in set(lost)]
    new = spec((1, 1, 1), rows=(0, 1, 2, 3))
    relocation = plan_relocation(old, new, lost_devices)
    assert relocation.lost == gone
    for device, pieces in relocation.pieces.items():
        assert not {piece.source for piece in pieces} & {*lost_devices}
        if not gone:
            assert sum(np.prod(piece.shape) for piece in pieces) == volume(relocation.boxes[device])


def test_what_a_device_has_already_stays_there():
    same = spec((1, 1, 8), "ep")
    for device, pieces in plan_relocation(same, same).pieces.items():
        assert {piece.source for piece in pieces} == {device}
