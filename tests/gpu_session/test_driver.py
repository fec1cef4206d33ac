"""The parent of scripts/gpu_session with jobs that hang, crash, print garbage and fill the disk; no GPU, no jax."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scripts import gpu_session
from scripts._session import records as records_module
from scripts._session.plan import Job, gpu_jobs, tiny_jobs
from scripts._session.process import End, Limits, run_process
from scripts._session.records import MOST_FILES, Records, read_results
from scripts._session.session import Session, default_folder
from scripts._session.summary import summarize

ROOT = Path(__file__).resolve().parents[2]
GOOD = 'print(\'{"kind": "check", "case": "a", "verdict": "right"}\')'
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def job(name: str, code: str, *kernels: str, seconds: float = 20, needed: bool = False) -> Job:
    return Job(name, seconds, (sys.executable, "-I", "-c", code), kernels, {}, needed)


def run_code(code: str, **limits: float) -> tuple[End, list[dict]]:
    results: list[dict] = []
    end = run_process([sys.executable, "-I", "-c", code], Limits(**{"seconds": 20, **limits}), {}, ROOT, results.append)
    return end, results


def ends(lines: list[dict]) -> dict[str, str]:
    return {line["job"]: line["status"] for line in lines if "status" in line}


def session(tmp_path: Path, jobs: list[Job], *, seconds: float = 100, alive: str = GOOD) -> list[dict]:
    records = Records(tmp_path / "out")
    Session(records, seconds=seconds, alive=job("alive", alive)).run(jobs)
    return read_results(records.folder)


# --- one process


@pytest.mark.parametrize(
    ("code", "limits", "status", "why"),
    [
        (GOOD, {}, "done", ""),
        ("import time; time.sleep(60)", {"seconds": 0.5}, "hung", "no end after 0.5 s"),
        ("import os; os.close(1); os.close(2)\nwhile True: pass", {"seconds": 0.5}, "hung", "no end after 0.5 s"),
        (CRASH, {}, "crashed", "signal 11"),
        (f"{GOOD}; raise ValueError('no')", {}, "crashed", "exit status 1"),
        (r"import sys; sys.stdout.buffer.write(bytes(range(256)) * 9); print('[1]', '{', '')", {}, "garbled", "no result"),
        ("print('[' * 100_000)", {}, "garbled", "no result"),
        ("while True: print('x' * 1000)", {"output": 10**6}, "flooded", "more than 1,000,000 bytes"),
        ("import os; open(os.environ['TMPDIR'] + '/a', 'wb').write(bytes(10**6))", {"file": 10**5}, "crashed", "status 1"),
        ("import time; time.sleep(60)", {"disk_left": 10**18}, "filled the disk", "bytes were left"),
    ],
)  # fmt: skip
def test_ends_of_a_process(code: str, limits: dict, status: str, why: str) -> None:
    end, _ = run_code(code, **limits)
    assert end.status == status
    assert why in end.why


def test_results_before_a_failure_are_kept_and_the_rest_is_said() -> None:
    end, results = run_code(f"print('hello'); {GOOD}; import sys; sys.stdout.flush(); {CRASH}")
    assert [line["verdict"] for line in results] == ["right"]
    assert (end.status, end.results, end.said) == ("crashed", 1, b"hello\n")


def test_last_line_needs_no_end() -> None:
    _, results = run_code("import sys; sys.stdout.write('{\"a\": 1}')")
    assert results == [{"a": 1}]


def test_nothing_outlives_a_job(tmp_path: Path) -> None:
    """A child of the job holds its pipe open, and is ended with it."""
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
{GOOD}
"""
    began = time.monotonic()
    end, _ = run_code(code)
    assert end.status == "done"
    assert time.monotonic() - began < 50
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    deadline = time.monotonic() + 50
    while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_files_of_a_job_are_removed(tmp_path: Path) -> None:
    code = f"""
import os
open(os.environ["TMPDIR"] + "/x", "w").close()
open({str(tmp_path / "d")!r}, "w").write(os.environ["TMPDIR"])
{GOOD}
"""
    run_code(code)
    assert not Path((tmp_path / "d").read_text()).exists()


# --- a session


def test_failure_costs_the_job_and_its_kernel(tmp_path: Path) -> None:
    lines = session(
        tmp_path,
        [
            job("first", CRASH, "a"),
            job("by a", GOOD, "a"),
            job("by a part of a", GOOD, "a.packed"),
            job("by a or b", f"import sys; assert sys.argv[1] == 'b'; {GOOD}", "a", "b"),
            job("by none", GOOD),
        ],
    )
    assert ends(lines) == {
        "first": "crashed",
        "alive": "done",
        "by a": "skipped",
        "by a part of a": "skipped",
        "by a or b": "done",
        "by none": "done",
    }
    assert [line["why"] for line in lines if line.get("status") == "skipped"] == ["a: crashed in 'first'"] * 2


def test_part_of_a_kernel_is_lost_alone(tmp_path: Path) -> None:
    lines = session(tmp_path, [job("packed", "print(1)", "a.packed"), job("by a", GOOD, "a")])
    assert ends(lines) == {"packed": "garbled", "alive": "done", "by a": "done"}


def test_job_may_say_that_a_kernel_is_lost(tmp_path: Path) -> None:
    lines = session(tmp_path, [job("check", 'print(\'{"lost": "a", "why": "wrong"}\')', "a"), job("speed", GOOD, "a")])
    assert ends(lines) == {"check": "done", "alive": "done", "speed": "skipped"}
    assert lines[-1]["why"] == "a: wrong in 'check'"


def test_session_ends_where_the_gpu_no_longer_works(tmp_path: Path) -> None:
    lines = session(tmp_path, [job("first", CRASH, "a"), job("second", GOOD, "b")], alive=CRASH)
    assert ends(lines) == {"first": "crashed", "alive": "crashed", "session": "ended", "second": "skipped"}
    assert "session: ended, the GPU no longer works after 'first'" in summarize(lines)


def test_session_ends_without_a_needed_job(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lines = session(tmp_path, [job("machine", "print(1)", needed=True), job("second", GOOD)])
    assert ends(lines) == {"machine": "garbled", "session": "ended", "second": "skipped"}
    assert "1\nset PYTHON to a Python that has jax and Flax" in capsys.readouterr().out


def test_job_that_does_not_fit_is_left_out_by_name(tmp_path: Path) -> None:
    lines = session(tmp_path, [job("long", GOOD, seconds=50), job("short", GOOD, seconds=20)], seconds=30)
    assert ends(lines) == {"long": "skipped", "short": "done"}
    assert lines[0]["why"] == "it may take 50 s, and 30 s are left"


# --- files


def test_results_wait_for_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path / "out")

    def half_written(file: int, data: bytes) -> int:
        if len(data) < 15:
            raise OSError(28, "No space left on device")
        return write(file, data[:5])

    write = os.write
    monkeypatch.setattr(records_module.os, "write", half_written)
    records.add({"job": "first"})
    monkeypatch.undo()
    assert read_results(records.folder) == []
    records.add({"job": "second"})
    assert [line["job"] for line in read_results(records.folder)] == ["first", "second"]


def test_results_cut_short_are_read_up_to_there(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"job": "a", "status": "done", "why": ""}\n{"job": "b", "sta')
    assert ends(read_results(tmp_path)) == {"a": "done"}
    with pytest.raises(FileNotFoundError, match=r"has no results\.jsonl: name the folder of a session"):
        read_results(tmp_path / "none")


def test_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old").touch()
    with pytest.raises(FileExistsError, match="has files: name a new folder with --out"):
        Records(tmp_path)


def test_default_folder_is_of_the_date_and_the_device() -> None:
    assert default_folder("NVIDIA H100 80GB HBM3").name.endswith("-nvidia_h100_80gb_hbm3")


# --- the plan and the command


def test_plan_fits_into_its_time_and_its_names_are_different() -> None:
    jobs = gpu_jobs()
    assert sum(job.seconds for job in jobs) <= gpu_session.MINUTES * 60
    for some in (jobs, tiny_jobs()):
        assert len({job.name for job in some}) == len(some)


def test_parent_imports_no_jax() -> None:
    code = "import sys; from scripts import gpu_session; print({'jax', 'numpy', 'torch', 'rich'} & {*sys.modules})"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


def test_number_of_gpus_is_checked_and_adds_jobs(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu_session.main(["--gpus", "0"])
    assert "--gpus is a number of GPUs of at least 1; got 0" in capsys.readouterr().err
    more = [job.name for job in gpu_jobs(8) if job.name not in {job.name for job in gpu_jobs()}]
    assert more == ["exchange, 8 devices", "dispatch, 8 devices"]


def test_rates_follow_from_an_exchange() -> None:
    from scripts._session.exchange import fit_links

    links = fit_links({10**6: 2e-3, 1000: 1e-3, 10**5: 1.1e-3}, 4)
    assert links.latency == 1e-3
    assert links.within == pytest.approx(999_000 * 3 / 4 / 1e-3)
    with pytest.raises(ValueError, match="two sizes or more give a speed"):
        fit_links({1000: 1e-3}, 4)


def test_command_writes_few_files_and_its_summary_can_be_had_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_session, "tiny_jobs", lambda gpus: [job("some", GOOD), job("bad", "print('no')")])
    monkeypatch.setattr(Session.__init__, "__kwdefaults__", {"tiny": False, "gpus": 1, "alive": job("alive", GOOD)})
    gpu_session.main(["--tiny", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["log.txt", "results.jsonl", "summary.txt"]
    assert len(files) <= MOST_FILES
    gpu_session.main(["--summary", str(tmp_path / "out")])
    summary = capsys.readouterr().out
    assert summary in printed
    assert "bad: garbled, it printed no result" in summary
    assert json.loads((tmp_path / "out/results.jsonl").read_text().splitlines()[0])["verdict"] == "right"


def test_every_planned_job_is_there_and_gpu_works_are_products_that_can_be_asked_for() -> None:
    from scripts._session import correctness
    from scripts._session.jobs import JOBS

    for planned in (*gpu_jobs(8), *tiny_jobs(8)):
        name = planned.command[3]
        assert callable(getattr(importlib.import_module(f"scripts._session.{JOBS[name]}"), name))
    works = [*correctness.plain_works(), *correctness.packed_works()]
    assert len({name for name, _ in works}) == len(works)
    for name, work in works:
        assert all(kind.random(np.random.default_rng(0), 2) is not None for kind in work.matrices if "2880" not in name)


def test_summary_has_every_kind_of_result() -> None:
    speed = {"shape": "q", "routing": "uniform", "tokens": 32, "side": "triton", "tuned": False, "fusion": False}
    text = summarize(
        [
            {
                "kind": "machine",
                "device": "a GPU",
                "multiprocessors": 132,
                "driver": "1",
                "versions": {"jax": "0.11.2"},
            },
            {"job": "x", "kind": "check", "case": "tails", "verdict": "wrong", "detail": "off"},
            {"kind": "ceilings", "flops_per_second": 8e14, "bytes_per_second": 3e12},
            {"kind": "speed", **speed, "seconds": 2e-4, "clock": "CUPTI", "flops": 1e9, "bytes": 3e8},
            {"kind": "tuned", "case": "c", "seconds": 1e-4, "tiles": "T", "default_seconds": 2e-4, "candidates": 12},
            {
                "kind": "layer",
                "shape": "q",
                "tokens": 32,
                "kernels": "triton",
                "seconds": 1e-3,
                "by_kernel": [["k", 1e-4]],
            },
            {
                "kind": "model",
                "layers": 48,
                "step": "decode",
                "batch": 8,
                "tokens": 1,
                "kernels": "triton",
                "seconds": 0.02,
                "tokens_per_second": 400.0,
            },
            {"job": "y", "left_out": "2 of 3 for want of time"},
        ]
    )
    for words in (
        "a GPU, 132 multiprocessors, driver 1; jax 0.11.2",
        "0 of 1 checks right",
        "x: wrong, tails: off",
        "ceilings 800 TFLOP/s, 3000 GB/s",
        "200.0 us  floor     100.0 us",
        "c: 100.0 us by T, 200.0 us by its own choice, 12 candidates",
        "q, 32 tokens, triton: 1000.0 us",
        "48 layers, decode of 8 x 1 by triton: 20.00 ms, 400 tokens/s",
        "y: left out, 2 of 3 for want of time",
    ):
        assert words in text


@pytest.mark.full
@pytest.mark.parametrize("gpus", [1, 8])
def test_tiny_session_runs_to_its_end(gpus: int, tmp_path: Path) -> None:
    """The command itself: every job is done, and what could not be done in one is named."""
    command = [sys.executable, "scripts/gpu_session.py", "--tiny", "--gpus", str(gpus), "--out", str(tmp_path / "out")]
    jobs = tiny_jobs(gpus)
    if gpus > 1:
        command += ["--jobs", "devices"]
        jobs = [job for job in jobs if job.needed or "devices" in job.name]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lines = read_results(tmp_path / "out")
    assert ends(lines) == {job.name: "done" for job in jobs}, printed
    for planned in jobs:
        results = [line for line in lines if line["job"] == planned.name and "status" not in line]
        assert results, planned.name
        assert all(line.get("verdict", "right") == "right" for line in results)
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) <= MOST_FILES
    one = ("checks right", "floor", "whole layer", "decode of 1 x 1 by portable")
    for words in ("results are in", *(one if gpus == 1 else ("all_to_all", "rates: memory", "what auto takes"))):
        assert words in printed
    assert (tmp_path / "out/jaxmoe/device_rates/cpu-8.json").exists() == (gpus > 1)
    # A plan for such a device could take what was measured.
    from jaxmoe.hardware import GPUS
    from jaxmoe.planning import read_measured

    found = read_measured(tmp_path / "out", dataclasses.replace(GPUS["h100"], name="cpu"))
    assert found.rates.keys() == (
        {"memory_bandwidth", "flops"} if gpus == 1 else {"memory_bandwidth", "within", "latency"}
    )
    assert {term for term, *_ in found.times} == {"experts" if gpus == 1 else "collective"}
