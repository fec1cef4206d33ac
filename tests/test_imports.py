"""A package imports only from those before it, and ``import jaxmoe`` is cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxmoe import _HOME as HOMES

PACKAGE = Path(__file__).resolve().parent.parent / "jaxmoe"

# Lowest first; two on one line never import each other. A new package gets its place here.
ORDER = [
    ["callable_package", "checks", "progress", "rotary", "supervise"],
    ["mesh", "hardware", "config", "distributed"],
    ["quant"],
    ["placement"],
    ["kernels"],
    ["dispatch"],
    ["layers"],
    ["models"],
    ["checkpoint"],
    ["elastic"],
    ["generate"],
    ["plan"],
    ["viz"],
    ["cli_options", "cli_units"],
    ["cli_bench", "cli_convert", "cli_inspect", "cli_place", "cli_plan", "cli_processes"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported_names(module: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in a file, those inside functions and type checks included."""
    package = ["jaxmoe", *module.parent.parts]
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(), filename=str(module))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # "from jaxmoe import mesh" names a package only in its last part.
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def top(module: Path) -> str:
    return module.parts[0].removesuffix(".py")


def packages_behind(name: str) -> set[str]:
    """The packages of jaxmoe that an imported name may load; names of the lazy top level stand for their homes."""
    root, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    if root != "jaxmoe" or first.startswith("__"):
        return set()
    if not first:
        return {home.split(".")[1] for home in HOMES.values()}
    return {HOMES[first].split(".")[1] if first in HOMES else first}


def test_every_package_has_a_place() -> None:
    unplaced = {top(module) for module in MODULES} - set(RANK)
    assert not unplaced, f"give these a line in ORDER, where the design has them: {sorted(unplaced)}"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_only_from_packages_before_it(module: Path) -> None:
    here = top(module)
    for line, name in imported_names(module):
        for package in packages_behind(name) - {here}:
            assert package in RANK, f"jaxmoe/{module}:{line} imports {name}, and jaxmoe has no such package"
            assert RANK[package] < RANK[here], (
                f"jaxmoe/{module}:{line}: {here} imports {package}, which does not come before it"
            )


def test_placement_needs_no_jax() -> None:
    for module in MODULES:
        if top(module) == "placement":
            roots = {name.split(".")[0] for _, name in imported_names(module)}
            assert not roots & {"jax", "jaxlib", "flax"}, f"jaxmoe/{module} is NumPy only"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap() -> None:
    # What was loaded, not how long it took: a clock fails on a busy machine.
    loaded = run_python("import sys; import jaxmoe; print(*{name.split('.')[0] for name in sys.modules})").split()
    assert not {"jax", "flax", "numpy", "torch", "transformers", "rich", "tokenizers", "orbax"} & set(loaded)


def test_placement_is_imported_without_jax() -> None:
    loaded = run_python("import sys, jaxmoe; jaxmoe.ExpertPlacement; print(*sys.modules)").split()
    assert not {"jax", "flax"} & set(loaded)


def test_no_public_name_starts_a_backend() -> None:
    code = (
        "import jaxmoe\n"
        "for name in jaxmoe.__all__: getattr(jaxmoe, name)\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    assert run_python(code) == "False"


def test_tests_share_helpers_through_support_only() -> None:
    """A test file is nobody's library: what several need is in tests/support, which imports no test."""
    tests = PACKAGE.parent / "tests"
    for file in sorted(tests.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(), filename=str(file))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "tests":
                assert node.module.startswith("tests.support"), (
                    f"{file.relative_to(tests)}:{node.lineno}: {node.module}"
                )
