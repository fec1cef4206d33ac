"""What README.md and the pages say holds: links lead somewhere, the example prints what is shown, commands print figures."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jaxmoe
from jaxmoe.cli import main
from jaxmoe.dispatch import DISPATCHES
from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul.backends import BACKENDS, GPU_BACKENDS
from jaxmoe.models import FAMILIES, WRAPPERS
from jaxmoe.placement import STRATEGIES
from tests.support.processes import environment

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FRONT = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
# A folder or file of the repository, as texts name it; not a part of a longer path.
NAMED = re.compile(r"`((?:jaxmoe|scripts|tests|docs|demo|notebooks|\.ci)/[\w./-]+)`")


@pytest.mark.parametrize("document", [*FRONT, *PAGES])
def test_links_and_pictures_are_there(document) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links or document not in FRONT
    for link in links:
        if "://" not in link:
            assert ((ROOT / document).parent / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize("document", [*FRONT, *PAGES])
def test_files_that_are_named_are_there(document) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert [name for name in NAMED.findall(text) if not (ROOT / name).exists()] == []


@pytest.mark.full
def test_the_example_prints_what_is_shown() -> None:
    code, shown = re.search(r"## Eight lines\n.*?```python\n(.*?)```.*?```\n(.*?)```", README, re.DOTALL).groups()
    assert len([line for line in code.splitlines() if line]) == 8
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == shown


def figures() -> list[tuple[str, str]]:
    """The figure and the command of every row of the table in README.md."""
    table = README.partition("## Figures")[2].partition("\n## ")[0]
    return re.findall(r"^\|[^|]*\| ([\d.]+)[^|]*\| `([^`]*)` \|$", table, re.MULTILINE)


def test_figures_are_found() -> None:
    assert len(figures()) == 6


@pytest.mark.parametrize("command", sorted({command for _, command in figures()}))
def test_figures_are_printed_by_their_commands(command, capsys, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *arguments = shlex.split(command)
    assert program == "jaxmoe"
    assert main(arguments) == 0
    printed = capsys.readouterr().out.split()
    assert [figure for figure, by in figures() if by == command and figure not in printed] == []


def test_predicted_times_are_those_of_the_model() -> None:
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("the kernel, which chooses its tiles, needs jax 0.11.2")
    from scripts.predict_kernels import END, PAGE, tables_of

    tables = tables_of(GPUS["h100"], ROOT / "results")
    text = PAGE.read_text(encoding="utf-8")
    shown = {begin: text.partition(begin)[2].partition(END)[0] for begin in tables}
    assert shown == tables, "run scripts/predict_kernels.py --write"


def test_measured_times_stand_beside_the_predicted_ones(tmp_path) -> None:
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("the kernel, which chooses its tiles, needs jax 0.11.2")
    from scripts.predict_kernels import read_measured, table

    h100 = GPUS["h100"]
    speed = {"kind": "speed", "shape": "qwen3-30b-a3b", "tokens": 32, "routing": "uniform", "side": "mosaic_gpu"}
    sessions = {
        "1-of-a-gpu": (h100.name, [speed | {"seconds": 410e-6}]),
        "2-of-a-gpu": (h100.name, [speed | {"seconds": 399e-6}, speed | {"routing": "zipf", "seconds": 1.0}]),
        "3-of-another": ("NVIDIA H200", [speed | {"seconds": 2.0}]),
        "4-on-a-cpu": ("cpu", [speed | {"seconds": 3.0}]),
        "5-of-triton": (
            h100.name,
            [speed | {"side": "triton", "seconds": 4.0}, speed | {"tuned": True, "seconds": 5.0}],
        ),
    }
    for name, (device, lines) in sessions.items():
        (tmp_path / name).mkdir()
        machine = {"kind": "machine", "device": device}
        (tmp_path / name / "results.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [machine, *lines]))
    measured = read_measured(tmp_path, h100)
    assert measured == {("qwen3-30b-a3b", 32): (399e-6, "2-of-a-gpu")}
    head, _, *rows = table(h100, measured).splitlines()
    assert head.endswith(f"| floor | measured on {h100.name} |")
    assert [row.split("|")[-2].strip() for row in rows if "| 32 |" in row and "qwen3-30b" in row] == [
        "399 (2-of-a-gpu)"
    ]


def test_every_public_name_has_a_line_and_a_place_in_the_reference() -> None:
    page = (ROOT / "docs/reference/api.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `(\w+)[^`|]*` \| [^|]+ \|$", page.partition("\n## ")[0], re.MULTILINE)
    places = re.findall(r"^::: jaxmoe\.(\w+)$", page, re.MULTILINE)
    assert lines == places
    assert sorted(lines) == sorted(set(jaxmoe.__all__) - {"__version__"})


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ("docs/reference/families.md", [*FAMILIES, *WRAPPERS]),
        ("docs/concepts/placement.md", STRATEGIES),
        ("docs/concepts/dispatch.md", DISPATCHES),
        ("docs/reference/versions.md", (BACKENDS.keys() | GPU_BACKENDS) - {"reference"}),
    ],
)
def test_every_entry_of_a_table_is_on_its_page(document, names) -> None:
    words = set(re.findall(r"\w+", (ROOT / document).read_text(encoding="utf-8")))
    assert sorted(set(names) - words) == []


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    notebooks = [f"docs/notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")]
    for page in [*PAGES, *notebooks]:
        assert page.removeprefix("docs/") in listed


def test_messages_in_troubleshooting_are_those_of_the_code() -> None:
    """Each quoted line, in parts where it has a "…", against the strings of the package."""
    strings = []
    for file in (ROOT / "jaxmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                strings.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    everything = "\n".join(strings)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quotes = re.findall(r"^> (.*)$", page, re.MULTILINE)
    assert len(quotes) > 30
    parts = [part.strip(" ,;:()") for quote in quotes for part in quote.split("…")]
    assert [part for part in parts if part not in everything] == []


@pytest.mark.full
def test_the_plans_beside_the_compiler_are_those_of_today() -> None:
    from scripts.compare_plans import BEGIN, CASES, END, PAGE, plan_of

    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    assert lines
    for line in lines:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        planned = plan_of(CASES[name])
        shown = f"{planned.held_bytes / 1e9:.2f}", f"{planned.step_bytes['prefill'] / 1e9:.3f}"
        assert (cells[3], cells[6]) == shown, "run scripts/compare_plans.py --write"
