"""A load that fails says why and leaves nothing behind."""

import errno
import os
import threading

import jax
import numpy as np
import pytest

from jaxmoe.checkpoint import CheckpointError, load_arrays, make_load_plan, open_checkpoint
from tests.support.loading import BF16, F16, F32, Case, add_tensor, check_arrays
from tests.support.meshes import mesh_of
from tests.support.writing import write_checkpoint

PATHS = {"direct": {"staging": False}, "staging": {"staging": True, "staging_bytes": 64 * 1024}}


@pytest.fixture(params=PATHS)
def path(request):
    return PATHS[request.param]


@pytest.fixture
def loading(tmp_path):
    case, mesh = Case(), mesh_of(2, 2, 2)
    for index in range(12):
        dims = ("tp", None) if index % 2 else (None, "tp")
        add_tensor(case, mesh, np.random.default_rng(index), f"w{index}", (16, 64), dims)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, case.tensors))
    return case, make_load_plan(checkpoint, case.specs, case.blocks), checkpoint.files[0].path


@pytest.fixture(autouse=True)
def nothing_left_behind():
    jax.devices()
    threads, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == files


def test_a_file_that_changed_since_the_plan(loading, path):
    _, plan, file = loading
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"must not change between planning and loading.*plan again"):
        load_arrays(plan, **path)


def test_a_file_that_was_cut_since_the_plan(loading, path):
    _, plan, file = loading
    os.truncate(file, plan.files[0].size - 1)
    with pytest.raises(CheckpointError, match=f"had {plan.files[0].size} bytes and has {plan.files[0].size - 1}"):
        load_arrays(plan, **path)


def test_a_file_that_is_gone(loading, path):
    _, plan, file = loading
    file.unlink()
    with pytest.raises(FileNotFoundError):
        load_arrays(plan, **path)


def test_a_file_that_is_cut_while_it_is_read(loading, path):
    _, plan, file = loading

    def cut(done, total):
        os.truncate(file, plan.files[0].size - 1000)

    with pytest.raises(
        CheckpointError, match=r"model.safetensors: the file ended at byte \d+, inside tensor 'w11.weight'"
    ):
        load_arrays(plan, progress=cut, **path)


def test_a_disk_that_fails(loading, path, monkeypatch):
    _, plan, _ = loading
    preadv, calls = os.preadv, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 5:
            raise OSError(errno.EIO, "Input/output error")
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(
        CheckpointError, match=r"tensor 'w\d+.weight' could not be read: .*Input/output error"
    ) as caught:
        load_arrays(plan, threads=2, **path)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(calls) < len(plan.reads), "the other threads went on"


def test_short_reads_are_continued(loading, path, monkeypatch):
    case, plan, _ = loading
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:100]], offset))
    arrays, report = load_arrays(plan, **path)
    check_arrays(case, arrays)
    assert report.bytes_read == report.bytes_needed


def test_an_exception_of_the_progress_callback_stops_the_load(loading, path):
    _, plan, _ = loading

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_arrays(plan, progress=stop, **path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_check_finite_names_tensor_and_file(value, dtype, path, tmp_path):
    case, mesh = Case(), mesh_of(2, 2, 2)
    for name in ("good", "bad"):
        add_tensor(case, mesh, np.random.default_rng(0), name, (16, 64), (None, "tp"), dtype)
    add_tensor(case, mesh, np.random.default_rng(0), "scalar", (), (), dtype)
    clean = make_load_plan(open_checkpoint(write_checkpoint(tmp_path / "clean", case.tensors)), case.specs, case.blocks)
    check_arrays(case, load_arrays(clean, check_finite=True, **path)[0])
    case.tensors["bad.weight"][13, 60] = value
    plan = make_load_plan(open_checkpoint(write_checkpoint(tmp_path, case.tensors)), case.specs, case.blocks)
    with pytest.raises(CheckpointError, match=r"model.safetensors: check_finite .* tensor 'bad.weight' holds some"):
        load_arrays(plan, check_finite=True, **path)
    load_arrays(plan, **path)
