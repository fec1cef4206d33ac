"""Every notebook runs from top to bottom, ends in a picture, and lies in the repository without outputs."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.processes import environment

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("1234567")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_stored_without_outputs(path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


def test_what_they_import_is_there() -> None:
    """The import statements of all notebooks, run as they stand; the rest of the cells is the full run's."""
    for path in NOTEBOOKS:
        code = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        code = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("%"))
        imports = [node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports, path
        exec(compile(ast.Module(imports, type_ignores=[]), path.name, "exec"), {})


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_ends_in_a_picture(path, monkeypatch) -> None:
    # The kernel is a process of its own: it chooses its devices itself.
    monkeypatch.setenv("XLA_FLAGS", environment(quick=True)["XLA_FLAGS"])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    client.execute()
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert any("image/png" in output.get("data", {}) for output in last.outputs)
