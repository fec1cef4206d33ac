"""scripts/mutate.py: its table of faults, and how it makes and judges them.

The script passes this file over where it runs tests on a fault: the table does not fit code that has one.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from scripts import mutate
from scripts.mutate import Fault, Result, Run, Runner, Summary

FAULT = Fault(name="half", file="jaxmoe/a/b.py", old="2 * x", new="3 * x", tests=("tests/test_a.py",))
SOURCE = "def double(x):\n    return 2 * x\n"


def result(name: str = FAULT.name, run: str | None = "short", fault: Fault = FAULT, runs: int = 1) -> Result:
    return Result(name=name, run=run, test=None, runs=runs, seconds=1.0, fault=mutate._fields(fault))


# --- the table


def test_the_table_fits_the_code_and_covers_every_package() -> None:
    faults = mutate.read_table()
    assert mutate.check_table(faults) == []
    packages = {path.parent.name for path in (mutate.ROOT / "jaxmoe").glob("*/__init__.py")}
    without = packages - {fault.package for fault in faults}
    assert not without, f"every package needs faults in scripts/_mutations.toml; these have none: {without}"
    assert len(faults) >= 60


@pytest.mark.parametrize(
    ("file", "package"),
    [
        ("jaxmoe/placement/trace_formats/vllm.py", "placement"),
        ("jaxmoe/mesh.py", "mesh"),
        ("jaxmoe/cli/place.py", "cli"),
        ("scripts/_train/step.py", "scripts"),
    ],
)
def test_the_package_of_a_fault(file: str, package: str) -> None:
    assert dataclasses.replace(FAULT, file=file).package == package


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("5 * x", "3 * x", "exactly once; it is there 0 times"),
        ("x", "y", "exactly once; it is there 2 times"),
        ("2 * x", "2 *", "has to be Python with the fault too"),
        ("2 * x", "(2 * x)  # nothing", "has to mean something else"),
    ],
)
def test_a_fault_that_does_not_fit_its_file_is_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mutate.mutated(dataclasses.replace(FAULT, old=old, new=new), SOURCE)


def test_the_table_is_checked_for_files_tests_and_names(tmp_path: Path) -> None:
    write_tree(tmp_path)
    assert mutate.check_table([FAULT], tmp_path) == []
    bad = [
        FAULT,
        FAULT,
        dataclasses.replace(FAULT, name="b", file="jaxmoe/no.py"),
        dataclasses.replace(FAULT, name="c", tests=()),
        dataclasses.replace(FAULT, name="d", tests=("tests/no.py",)),
    ]
    twice, no_file, no_tests, no_path = mutate.check_table(bad, tmp_path)
    assert "'half': a name stands for one fault" in twice
    assert "no.py" in no_file
    assert no_tests == "'c': some tests have to be meant to notice it"
    assert no_path == "'d': there is no tests/no.py"


def test_selection_by_name_and_package() -> None:
    faults = [FAULT, dataclasses.replace(FAULT, name="Quarter", file="jaxmoe/c/d.py")]
    assert mutate.select(faults, [], []) == faults
    assert mutate.select(faults, ["QUART", "third"], []) == faults[1:]
    assert mutate.select(faults, [], ["a"]) == faults[:1]
    assert mutate.select(faults, ["half"], ["c"]) == []


# --- the summary


@pytest.mark.parametrize(
    ("short", "full_alone", "survived", "good"),
    [
        (19, 0, 1, True),  # 95 % by the full run
        (18, 0, 2, False),
        (18, 2, 0, True),  # 90 % of them by the short run
        (17, 3, 0, False),
        (0, 0, 0, False),
    ],
)
def test_both_shares_are_wanted(short: int, full_alone: int, survived: int, good: bool) -> None:
    runs = ["short"] * short + ["full"] * full_alone + [None] * survived
    summary = Summary.of([result(f"fault {i}", run) for i, run in enumerate(runs)])
    assert (summary.faults, summary.full, summary.short) == (len(runs), short + full_alone, short)
    assert summary.good is good
    assert str(summary).count("survived: fault ") == survived


def test_the_named_paths_alone_have_to_catch_every_fault() -> None:
    assert Summary.of([result()] * 20, narrow=True).good
    summary = Summary.of([result()] * 19 + [result("fault 1", None)], narrow=True)
    assert not summary.good
    assert str(summary) == "the short run of the paths named with them catches 19 of 20 (95.0 %)\nsurvived: fault 1"


# --- judging one fault


class FakeRunner:
    """Tells of a failure where `fails` says so of (full, paths), and remembers what was asked."""

    def __init__(self, tree: Path, fails: Callable[[bool, tuple[str, ...]], bool]) -> None:
        self.tree, self.fails = tree, fails
        self.asked: list[tuple[bool, tuple[str, ...]]] = []

    def run(self, tree: Path, paths: Sequence[str], *, full: bool, to_the_end: bool = False) -> Run:
        assert tree == self.tree
        assert ("3 * x" in (tree / FAULT.file).read_text()) is not to_the_end
        self.asked.append((full, tuple(paths)))
        return Run(1, "tests/test_a.py::test", "last line") if self.fails(full, tuple(paths)) else Run(0, None, "")


NAMED, EVERYTHING = FAULT.tests, ()


@pytest.mark.parametrize(
    ("options", "first_to_fail", "asked", "run"),
    [
        ({}, (False, NAMED), [(False, NAMED)], "short"),
        ({}, (False, EVERYTHING), [(False, NAMED), (False, EVERYTHING)], "short"),
        ({}, (True, NAMED), [(False, NAMED), (False, EVERYTHING), (True, NAMED)], "full"),
        ({}, (True, EVERYTHING), [(False, NAMED), (False, EVERYTHING), (True, NAMED)], None),
        (
            {"thorough": True},
            (True, EVERYTHING),
            [(False, NAMED), (False, EVERYTHING), (True, NAMED), (True, EVERYTHING)],
            "full",
        ),
        ({"narrow": True}, (False, EVERYTHING), [(False, NAMED)], None),
    ],
)
def test_a_fault_meets_wider_and_wider_runs(
    tmp_path: Path, options: dict, first_to_fail: tuple, asked: list, run: str | None
) -> None:
    write_tree(tmp_path)
    runner = FakeRunner(tmp_path, lambda *question: question == first_to_fail)
    found = mutate.judge(runner, tmp_path, FAULT, **{"narrow": False, "thorough": False, **options})
    assert runner.asked == asked
    assert (found.run, found.test, found.runs) == (run, run and "tests/test_a.py::test", len(asked))
    assert (tmp_path / FAULT.file).read_text() == SOURCE


def test_a_failing_test_without_a_fault_ends_the_script(tmp_path: Path) -> None:
    write_tree(tmp_path)
    options = {"narrow": False, "thorough": False}
    runner = FakeRunner(tmp_path, lambda full, paths: full)
    with pytest.raises(
        RuntimeError, match=r"the full run ended with tests/test_a.py::test: mend that first\nlast line"
    ):
        mutate.run_baseline(runner, tmp_path, [FAULT], **options)
    assert runner.asked == [(False, EVERYTHING), (True, NAMED)]
    mutate.run_baseline(FakeRunner(tmp_path, lambda full, paths: False), tmp_path, [FAULT], **options)


@pytest.mark.parametrize(
    ("output", "test"),
    [
        ("FAILED tests/test_a.py::test[a - b] - assert 1 == 2\nFAILED tests/b.py::c", "tests/test_a.py::test[a"),
        ("..\nFAILED tests/test_a.py::test[1 x]\n1 failed", "tests/test_a.py::test[1 x]"),
        ("ERROR tests/test_a.py - NameError: x", "tests/test_a.py"),
        ("FAILED to start", None),
    ],
)
def test_the_first_failure_in_an_output(output: str, test: str | None) -> None:
    assert mutate.first_failure(output) == test


# --- with pytest

CONFTEST = """
import pytest

def pytest_addoption(parser):
    parser.addoption("--full", action="store_true")

def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        items[:] = [item for item in items if "full" not in item.name]
"""
TESTS = """
from jaxmoe.a.b import double

def test_short():
    assert double(0) == 0

def test_full():
    assert double(1) == 2
"""


def write_tree(tree: Path) -> None:
    """A repository with one function and its tests, of which the full run alone would notice the fault."""
    contents = {
        "jaxmoe/__init__.py": "",
        FAULT.file: SOURCE,
        "tests/__init__.py": "",
        "tests/conftest.py": CONFTEST,
        "tests/test_a.py": TESTS,
    }
    for name, text in contents.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)


@pytest.mark.full
def test_runs_of_pytest(tmp_path: Path) -> None:
    tree = tmp_path.resolve()
    write_tree(tree)
    runner = Runner(python=sys.executable, workers=0, limit=600)
    runner.check(tree)
    with mutate.made_in(tree, FAULT):
        assert runner.run(tree, FAULT.tests, full=False).passed
        failed = runner.run(tree, FAULT.tests, full=True)
    assert (failed.status, failed.cause) == (1, "tests/test_a.py::test_full")

    (tree / "tests/test_a.py").write_text("import time\n\ndef test_slow():\n    time.sleep(60)\n")
    stopped = dataclasses.replace(runner, limit=0.5).run(tree, (), full=False)
    assert not stopped.passed
    assert stopped.cause == "(the time limit)"
    (tree / "tests/conftest.py").unlink()
    with pytest.raises(RuntimeError, match="pytest has to understand"):
        runner.run(tree, (), full=True)


def test_an_interpreter_with_another_jaxmoe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="has to import jaxmoe from"):
        Runner(python=sys.executable, workers=0, limit=600).check(tmp_path.resolve())


def test_the_copy_comes_before_what_is_installed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", "own")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    found = mutate.environment(tmp_path)
    assert found["PYTHONPATH"] == f"{tmp_path}{os.pathsep}own"
    assert found["PYTHONWARNINGS"] == "ignore:Error reading persistent compilation cache"
    assert found["OMP_NUM_THREADS"] == "3"


# --- results


def test_a_results_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    assert mutate.read_results(file, [FAULT], 1) == {}
    changed = dataclasses.replace(FAULT, name="changed", new="4 * x")
    for line in (result(run=None), result(run="full"), result("changed", fault=dataclasses.replace(changed, new="5"))):
        mutate.append_result(file, line)
    # The last line counts, and none about what the table does not have any more.
    assert mutate.read_results(file, [FAULT, changed], 3) == {FAULT.name: result(run="full")}
    with file.open("a") as lines:
        lines.write(json.dumps({"name": "half"}) + "\n")
    with pytest.raises(ValueError, match=r"line 4, has to be a result of scripts/mutate\.py"):
        mutate.read_results(file, [FAULT], 3)


def test_a_survivor_of_fewer_runs_has_to_meet_the_others(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    mutate.append_result(file, result(run=None, runs=1))
    assert mutate.read_results(file, [FAULT], 1) == {FAULT.name: result(run=None, runs=1)}
    assert mutate.read_results(file, [FAULT], 3) == {}
