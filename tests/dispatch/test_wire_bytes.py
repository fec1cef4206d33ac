"""Bytes that each collective sends, by what it is made of."""

import pytest

from jaxmoe.dispatch.collectives import Collective


def sent(op, devices: int, payload: float | None = 1.0) -> float:
    return Collective(op=op, axes=("ep",), devices=devices, bytes=960, payload=payload).wire_bytes


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_a_device_sends_all_but_its_own_share(devices):
    share = 960 / devices
    for op in ("all-to-all", "all-gather", "reduce-scatter"):
        assert sent(op, devices) == pytest.approx(960 - share)
    assert sent("all-reduce", devices) == pytest.approx(sent("reduce-scatter", devices) + sent("all-gather", devices))


def test_a_ragged_exchange_alone_sends_no_padding():
    assert sent("ragged-all-to-all", 4, payload=0.25) == pytest.approx(sent("all-to-all", 4, payload=0.25) / 4)
    assert sent("ragged-all-to-all", 4, payload=None) == sent("all-to-all", 4, payload=None)
