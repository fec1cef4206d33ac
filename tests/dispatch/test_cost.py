"""Costs of a dispatch: sums count in float32, and every collective with its latency."""

import pytest

from jaxmoe.dispatch import DISPATCHES, DispatchLayout, DispatchShape
from jaxmoe.dispatch.choose import DispatchCost
from jaxmoe.hardware import Device, Links

LAYOUT = DispatchLayout(
    mesh_shape=(("dp", 2), ("tp", 2), ("ep", 4)), expert_axes=("ep",), partial_axes=("tp",), num_slots=16
)


@pytest.mark.parametrize("name", DISPATCHES)
def test_sums_travel_in_float32_and_rows_in_their_own_dtype(name):
    wide, narrow = (
        DISPATCHES[name].collectives(DispatchShape(tokens=4096, choices=2, width=64, itemsize=itemsize, layout=LAYOUT))
        for itemsize in (4, 2)
    )
    assert [each.op for each in wide] == [each.op for each in narrow]
    for of_four, of_two in zip(wide, narrow, strict=True):
        same = of_four.op in ("reduce-scatter", "all-reduce") or of_four.payload is None
        assert of_two.bytes == (of_four.bytes if same else of_four.bytes / 2), of_four


def test_every_collective_takes_its_latency():
    device = Device(name="slow", memory_bandwidth=100.0, links=Links(within=10.0, between=1.0, latency=7.0))
    cost = DispatchCost(wire_bytes=50.0, memory_bytes=300.0, collectives=4)
    assert cost.seconds(device) == pytest.approx(50 / 10 + 300 / 100 + 4 * 7)
