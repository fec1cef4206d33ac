"""A load shows how full its devices are: bars on a terminal, few lines elsewhere, and in the end what the plan says."""

import io
import re

import pytest
import rich.console
from rich.filesize import decimal

import jaxmoe
from jaxmoe.checkpoint.loading.filling import load_progress
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import write_plain

QWEN = GOLDENS / "qwen3_moe" / "original"


@pytest.fixture
def screen(monkeypatch):
    """A function that makes stderr a terminal or not, and gives what is written to it."""
    make = rich.console.Console

    def of(terminal: bool) -> io.StringIO:
        file = io.StringIO()

        def console(**options):
            assert options == {"stderr": True}
            return make(file=file, force_terminal=terminal, width=120, height=40, color_system=None, _environ={})

        monkeypatch.setattr(rich.console, "Console", console)
        return file

    return of


def last_frame(text: str) -> list[str]:
    """The lines that stay on a terminal; each frame begins with the bar of the bytes that are read."""
    frame = text[text.rindex("loading") :]
    lines = [re.sub(r"\x1b\[[?\dA-Za-z]*?[A-Za-z]", "", line).rstrip() for line in frame.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_terminal_shows_each_device_fill_up_to_what_the_plan_says(quantize, screen, tmp_path) -> None:
    path, shown = write_plain(tmp_path / "plain", "qwen3_moe"), screen(True)
    model = jaxmoe.load(path, mesh=mesh_of(2, 2, 2), quantize=quantize, progress=True)
    held = model.load_report.bytes_per_device
    bar, *rows = last_frame(shown.getvalue())
    assert bar.startswith("loading plain ━")
    assert [row.split("━")[0].strip() for row in rows] == [f"device {device}" for device in held]
    for row, size in zip(rows, held.values(), strict=True):
        assert row.endswith(f"━ {decimal(size)} of {decimal(size)}")


def test_of_many_devices_the_emptiest_and_the_fullest_are_shown(screen) -> None:
    shown = screen(True)
    with load_progress("loading", True, range(3, 20), 4000) as (read, placed):
        read(1000, 8000)
        for device in range(3, 20):
            placed(device, 1000)
        placed(7, 1000)
        placed(8, -500)
    assert [line.split("━")[0].strip() for line in last_frame(shown.getvalue())[1:]] == [
        "emptiest, device 8",
        "fullest, device 7",
    ]
    assert "2.0 kB of 4.0 kB" in last_frame(shown.getvalue())[2]


def test_elsewhere_there_are_few_lines_and_no_bar(screen) -> None:
    shown = screen(False)
    model = jaxmoe.load(QWEN, mesh=mesh_of(2, 2, 2), progress=True)
    size, read = decimal(model.load_report.bytes_per_device[0]), decimal(model.load_report.bytes_read)
    lines = shown.getvalue().splitlines()
    assert 1 <= len(lines) <= 4
    assert lines[-1] == f"loading original: {read} of {read} read, {size} to {size} of {size} on each of 8 devices"
    assert "\x1b" not in shown.getvalue()


def test_a_load_that_fails_says_nothing_more(screen) -> None:
    shown = screen(False)

    def fail(read) -> None:
        for done in range(9):
            read(done, 8)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"), load_progress("loading", True, [0], 10) as (read, _):
        fail(read)
    assert [line.split(" of ")[0] for line in shown.getvalue().splitlines()] == [
        f"loading: {done} bytes" for done in (2, 4, 6)
    ]


def test_nobody_is_told_of_devices_who_did_not_ask() -> None:
    calls: list[tuple[int, int]] = []

    def told(done: int, total: int) -> None:
        calls.append((done, total))

    for progress, read in ((False, None), (told, told)):
        with load_progress("loading", progress, [0], 10) as callbacks:
            assert callbacks == (read, None)
    report = jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 2), progress=told).load_report
    assert calls[-1] == (report.bytes_read, report.bytes_read)
