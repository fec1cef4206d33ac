"""A package imports only from those before it, and ``import jaxmoe`` is cheap."""

import ast
import gc
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxmoe.__main__
from jaxmoe import _HOME as HOMES

PACKAGE = Path(__file__).resolve().parent.parent / "jaxmoe"

# Lowest first; two on one line never import each other. A new package gets its place here.
ORDER = [
    ["checks", "numerics", "progress", "rotary", "supervise", "user_files"],
    ["mesh", "hardware", "config", "distributed", "compile_cache"],
    ["quant"],
    ["placement"],
    ["kernels"],
    ["dispatch"],
    ["layers"],
    ["models"],
    ["checkpoint"],
    ["elastic", "interop"],
    ["generation"],
    ["planning", "serving", "batches"],
    ["viz"],
    ["cli"],
    ["__main__"],
]
# The packages of `checkpoint`, and which of the others each imports.
ROOMS = {
    "formats": set(),
    "mapping": {"formats"},
    "lora": {"formats", "mapping"},
    "loading": {"formats", "mapping", "lora"},
    "saving": {"formats", "mapping"},
    "inspection": {"formats", "mapping"},
}
FOR_ALL_ROOMS = {"boxes", "errors", "nearest"}
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


def room(module: Path) -> str | None:
    """The package of `checkpoint` that a file is in."""
    return module.parts[1] if top(module) == "checkpoint" and len(module.parts) == 3 else None


def test_every_file_of_checkpoint_is_in_a_room() -> None:
    files = {module.relative_to("checkpoint") for module in MODULES if top(module) == "checkpoint"}
    rooms = {file.parts[0] for file in files if len(file.parts) > 1}
    assert rooms == set(ROOMS), "give a new package of checkpoint a line in ROOMS"
    assert {file.stem for file in files if len(file.parts) == 1} == {"__init__", *FOR_ALL_ROOMS}


@pytest.mark.parametrize("module", [module for module in MODULES if room(module)], ids=str)
def test_rooms_of_checkpoint_import_one_way(module: Path) -> None:
    here = room(module)
    assert here is not None
    for line, name in imported_names(module):
        if name == "jaxmoe.checkpoint" or name.startswith("jaxmoe.checkpoint."):
            there = [*name.split("."), ""][2]
            assert there in {here, *ROOMS[here], *FOR_ALL_ROOMS}, (
                f"jaxmoe/{module}:{line} imports {name}; {here} imports from {sorted(ROOMS[here] | FOR_ALL_ROOMS)} only"
            )


@pytest.mark.parametrize("name", sorted(FOR_ALL_ROOMS))
def test_what_all_rooms_use_imports_none(name: str) -> None:
    imported = [found for _, found in imported_names(Path("checkpoint", f"{name}.py"))]
    assert not [found for found in imported if found.split(".")[0] == "jaxmoe"]


def test_a_room_is_entered_by_what_it_exports() -> None:
    for module in MODULES:
        for line, name in imported_names(module):
            _, package, *inside = [*name.split("."), ""]
            if package == "checkpoint" and inside[0] in ROOMS and inside[0] != room(module):
                assert len(inside) == 3, f"jaxmoe/{module}:{line} imports {name}, and not from {inside[0]} itself"


def dotted(module: Path) -> str:
    return ".".join(["jaxmoe", *module.with_suffix("").parts]).removesuffix(".__init__")


def home(name: str) -> str | None:
    """The module of jaxmoe that an imported name is, or is in; None where it is not jaxmoe's."""
    root, _, rest = name.partition(".")
    if root == "jaxmoe" and rest in HOMES:
        return home(f"{HOMES[rest]}.{rest}")
    while name and name not in NAMES:
        name = name.rpartition(".")[0]
    return name or None


NAMES = {dotted(module) for module in MODULES}


def run_time_imports(module: Path) -> set[str]:
    """The modules of jaxmoe that a file imports when it runs, inside functions too."""
    for_types = [
        range(node.lineno, node.body[-1].end_lineno + 1)
        for node in ast.walk(ast.parse((PACKAGE / module).read_text()))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    found = {home(name) for line, name in imported_names(module) if not any(line in lines for lines in for_types)}
    return {name for name in found if name} - {dotted(module)}


def test_no_module_imports_itself_by_way_of_others() -> None:
    left = {dotted(module): run_time_imports(module) for module in MODULES}
    # Take away, again and again, whatever imports nothing that is left. What stays is a cycle, or imports one.
    while done := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in done}
    if left:
        way = [min(left)]
        while way[-1] not in way[:-1]:
            way.append(min(left[way[-1]] & left.keys()))
        pytest.fail(f"modules import each other in a cycle: {' -> '.join(way[way.index(way[-1]) :])}")


def test_what_is_imported_is_installed_with_the_package() -> None:
    """Tests have more installed than users: what the package imports is among its dependencies, or of an extra for plots."""
    document = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", line)[0] for line in document["dependencies"]}
    extras = document["optional-dependencies"]
    names = ("notebooks", "serve", "constrain")
    plots, server, schemas = ({re.match(r"[\w-]+", line)[0] for line in extras[name]} for name in names)
    for module in MODULES:
        for line, name in imported_names(module):
            root = name.partition(".")[0]
            if root != "jaxmoe" and root not in sys.stdlib_module_names:
                rooms = {"viz": plots, "placement": plots, "serving": server, "generation": schemas}
                allowed = needed | rooms.get(top(module), set())
                # A namespace that several distributions share is not called like one of them.
                assert {"orbax": "orbax-checkpoint"}.get(root, root) in allowed, (
                    f"jaxmoe/{module}:{line} imports {root}, which is no dependency"
                )


def test_placement_and_quantized_formats_need_no_jax() -> None:
    for module in MODULES:
        if top(module) in ("placement", "quant"):
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


def test_help_is_cheap() -> None:
    code = "import sys; from jaxmoe.cli import main\ntry: main(['place', '--help'])\nfinally: print(*sys.modules)"
    loaded = {name.split(".")[0] for name in run_python(code).split()}
    assert "jaxmoe" in loaded
    assert not {"jax", "flax", "numpy", "rich"} & loaded


def test_placing_needs_no_jax() -> None:
    words = [
        "place",
        str(PACKAGE.parent / "demo/traces/first_half_tokens.npz"),
        "--hidden-size",
        "8",
        "--moe-intermediate-size",
        "8",
    ]
    words += ["--ep", "2", "--strategies", "linear", "--expert-map", "0"]
    loaded = run_python(
        f"import sys; from jaxmoe.cli import main; assert main({words}) == 0; print(*sys.modules)"
    ).split()
    assert "jaxmoe.interop.expert_maps" in loaded
    assert not {"jax", "flax"} & set(loaded)


def test_inspecting_loads_nothing_that_runs_a_model_and_collects_no_garbage() -> None:
    code = (
        "import gc, sys; from jaxmoe.cli import main\n"
        "def count(): return sum(each['collections'] for each in gc.get_stats())\n"
        f"before = count(); main(['inspect', {str(PACKAGE.parent / 'demo')!r}]); after = count()\n"
        "print('\\n', after - before, *sys.modules)"
    )
    collections, *loaded = run_python(code).splitlines()[-1].split()
    assert int(collections) <= 1  # as the limit is taken back, behind all the work
    assert "jaxmoe.checkpoint.inspection" in loaded
    names = {".".join(name.split(".")[:2]) if name.startswith("jaxmoe") else name.split(".")[0] for name in loaded}
    assert not {"orbax", "tensorstore", "tokenizers", "jinja2", "llguidance", "jaxmoe.generation"} & names


def test_a_process_ends_with_its_status_and_without_a_last_collection(monkeypatch) -> None:
    frozen = []
    monkeypatch.setattr(jaxmoe.__main__, "main", lambda: 1)
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(True))
    with pytest.raises(SystemExit) as ended:
        jaxmoe.__main__.run()
    assert (ended.value.code, frozen) == (1, [True])


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
