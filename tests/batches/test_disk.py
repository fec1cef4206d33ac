"""Outputs on file systems that fill up or may not be written: nothing half-written looks whole, and a run goes on.

The file systems are real ones, in memory; the tests are skipped where none may be mounted (``unshare -Urm`` allows it).
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxmoe.cli import main
from tests.support.batches import checkpoint, read, run, write
from tests.support.processes import ROOT

LINES = [
    {
        "prompt": [5, index % 30 + 1],
        "max_tokens": 1 + index * 7 % 13,
        "id": "x" * (37 * index % 900),
        "n": 1 + index % 2,
    }
    for index in range(60)
]
PAGE = 4096
NOBODY = 65534


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("batches") / "checkpoint")


class Disk:
    """A file system in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, pages: int, *options: str) -> bool:
        """Mount it, or mount it again with other options; whether that is allowed."""
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={pages * PAGE}", *options]), "tmpfs", str(self.path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    if sys.platform != "linux":
        pytest.skip("tmpfs is of Linux")
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    if not disk.mount(1):
        pytest.skip("no file system may be mounted here; run as root, or in `unshare -Urm`")
    disk.unmount()
    return disk


@pytest.mark.parametrize("pages", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("order", ["input", "finished"])
def test_a_disk_that_fills_again_and_again(order, pages, source, disk, tmp_path) -> None:
    """It grows by a page each time that the run has ended for want of room."""
    input, whole, output = write(tmp_path / "in.jsonl", LINES), tmp_path / "whole.jsonl", disk.path / "out.jsonl"
    run(source, input, whole, order=order)
    assert whole.stat().st_size > 8 * PAGE
    assert disk.mount(pages)
    try:
        before, messages = b"", []
        while True:
            try:
                run(source, input, output, order=order)
                break
            except OSError as error:
                messages.append(str(error))
            now = output.read_bytes() if output.exists() else b""
            assert now.startswith(before), "a line that was there is gone"
            assert not now or now.endswith(b"\n"), "there is half a line"
            assert len(messages) < 100
            before, pages = now, pages + 1
            assert disk.mount(pages, "remount")
        assert any("at the output of line" in message for message in messages)
        for message in messages:
            assert re.search(
                r"out\.jsonl cannot be written(, at the output of line \d+)?: No space left on device.* make room",
                message,
            )
        lines = read(output)
        assert sorted(one["line"] for one in lines) == list(range(1, 61))
        if order == "input":
            assert output.read_bytes() == whole.read_bytes()
        assert {path.suffix for path in disk.path.iterdir()} <= {".jsonl", ".json", ".lock"}
    finally:
        disk.unmount()


def test_a_disk_that_is_full_is_told_before_the_work(source, disk, tmp_path) -> None:
    input, output = write(tmp_path / "in.jsonl", LINES), disk.path / "out.jsonl"
    assert disk.mount(4)
    try:
        (disk.path / "other").write_bytes(b"x" * 4 * PAGE)
        with pytest.raises(OSError, match=r"out\.jsonl cannot be written: No space left on device"):
            run(source, input, output, engine=object())
        assert not output.exists()
        (disk.path / "other").unlink()
        run(source, write(input, LINES[:1]), output)
        assert len(read(output)) == 1
    finally:
        disk.unmount()


def test_a_disk_that_may_only_be_read(source, disk, tmp_path, capsys) -> None:
    input, output = write(tmp_path / "in.jsonl", LINES[:2]), disk.path / "out.jsonl"
    assert disk.mount(16)
    try:
        run(source, input, output)
        before = output.read_bytes()
        assert disk.mount(16, "remount", "ro")
        with pytest.raises(OSError, match=r"out\.jsonl cannot be written: Read-only file system"):
            run(source, input, output, engine=object())
        assert output.read_bytes() == before
        argv = ["generate", str(ROOT / "demo"), "--input", str(input), "--output", str(disk.path / "new.jsonl")]
        assert main(argv) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(r"jaxmoe: error: .*new\.jsonl cannot be written: Read-only file system", line)
    finally:
        disk.unmount()


@contextlib.contextmanager
def as_another_user() -> Iterator[None]:
    """Do without the rights of root, who may write anything."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public():
    """A folder that others may look into, with an input and a checkpoint."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        try:
            with as_another_user():
                seen = os.access(folder, os.R_OK | os.X_OK, effective_ids=True)
        except OSError:
            pytest.skip("root has no other user to be here")
        if not seen:
            pytest.skip("the folder of temporary files is closed to other users")
        checkpoint(folder / "checkpoint")
        write(folder / "in.jsonl", LINES[:4])
        yield folder


@pytest.mark.skipif(sys.platform != "linux", reason="effective ids and permissions as Linux has them")
@pytest.mark.parametrize("closed", ["", "out.jsonl", "out.jsonl.ahead", "out.jsonl.lock"])
def test_what_may_not_be_written_is_named_before_the_work(closed, public) -> None:
    folder = public / "outputs"
    folder.mkdir()
    folder.chmod(0o777)
    source, input, output = public / "checkpoint", public / "in.jsonl", folder / "out.jsonl"
    with as_another_user():
        run(source, input, output)
        whole = output.read_bytes()
        output.write_bytes(whole[: whole.index(b"\n") + 1])  # work is left
        (folder / "out.jsonl.ahead").touch()
    victim = folder / closed
    if os.geteuid() == 0:
        os.chown(victim, 0, 0)
    victim.chmod(0o555 if victim.is_dir() else 0o444)
    with as_another_user():
        with pytest.raises(PermissionError, match=r"out\.jsonl cannot be written: Permission denied") as caught:
            run(source, input, output, engine=object())
        assert closed == "out.jsonl" or f"({victim if closed else folder / 'out.jsonl.run.json.partial'})" in str(
            caught.value
        )
    assert output.read_bytes() == whole[: whole.index(b"\n") + 1]
    victim.chmod(0o777)
    with as_another_user():
        run(source, input, output)
    assert output.read_bytes() == whole
    assert [json.loads(line)["line"] for line in whole.splitlines()] == [1, 2, 3, 4]
