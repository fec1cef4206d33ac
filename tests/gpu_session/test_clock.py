"""The session's clocks, with a driver's record of kernels that is made up."""

import sys
from types import SimpleNamespace

import jax
import pytest

from jaxmoe.kernels.grouped_matmul.gpu_clock import kernel_times
from scripts._session.clock import measure

PROFILER = "jax.experimental.mosaic.gpu.profiler"


class Record:
    """What the extension of jaxlib gives: (name, milliseconds) of each kernel between two calls, in order."""

    def __init__(self, *turns: list[tuple[str, float]]) -> None:
        self.turns, self.recording = list(turns), False

    def _cupti_init(self) -> None:
        assert not self.recording, "a record that was never read is lost"
        self.recording = True

    def _cupti_get_timings(self, finalize: bool) -> list[tuple[str, float]]:
        assert finalize, "CUPTI stays attached, and a profiler that comes later finds it taken"
        self.recording = False
        return self.turns.pop(0)


def put_in_place(monkeypatch: pytest.MonkeyPatch, record: object) -> None:
    """Let jax's profiler have this extension."""
    fake = SimpleNamespace(mosaic_gpu_lib=SimpleNamespace(_mosaic_gpu_ext=record))
    monkeypatch.setitem(sys.modules, PROFILER, fake)


def a_gpu() -> jax.Device:
    """As much of a GPU as a clock looks at."""
    device: jax.Device = SimpleNamespace(platform="gpu")  # type: ignore[assignment]
    return device


def test_kernels_are_in_seconds_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record([("second_in_length", 0.25), ("first", 1.5), ("second_in_length", 0.25)])
    put_in_place(monkeypatch, record)
    called = []
    assert kernel_times(lambda: called.append(record.recording)) == [
        ("second_in_length", 0.25e-3),
        ("first", 1.5e-3),
        ("second_in_length", 0.25e-3),
    ]
    assert called == [True], "the call is made once, while the driver records"


def test_record_ends_where_a_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record([("some", 1.0)])
    put_in_place(monkeypatch, record)
    with pytest.raises(ZeroDivisionError):
        kernel_times(lambda: 1 / 0)
    assert not record.recording


def test_record_without_a_kernel_and_jax_without_cupti_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, Record([]))
    with pytest.raises(RuntimeError, match="CUPTI saw no kernel"):
        kernel_times(lambda: None)
    put_in_place(monkeypatch, object())
    with pytest.raises(RuntimeError, match=r"this jax has no CUPTI \(.*_cupti_init"):
        kernel_times(lambda: None)


def test_median_turn_counts_and_its_kernels_add_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [[("product", ms), ("sum", 1.0), ("product", ms)] for ms in (9.0, 2.0, 4.0)]
    put_in_place(monkeypatch, Record(*turns))
    timed = measure(lambda: None, a_gpu(), calls=2, rounds=3)
    assert timed.clock == "CUPTI"
    assert timed.by_kernel == [("product", pytest.approx(4e-3)), ("sum", pytest.approx(0.5e-3))]
    assert timed.seconds == pytest.approx(4.5e-3)


def test_wall_clock_is_named_where_the_driver_gives_none(monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_place(monkeypatch, object())
    timed = measure(lambda: None, a_gpu(), calls=2, rounds=1)
    assert timed.seconds == timed.wall_seconds
    assert timed.clock.startswith("the wall's clock over 2 calls (this jax has no CUPTI")
    assert timed.by_kernel == []
