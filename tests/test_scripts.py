"""The scripts that make environments."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- finding a Python


def find_python(path: Path, wanted: str = "") -> subprocess.CompletedProcess[str]:
    """``find_python`` of _environment.sh with only the commands in ``path``, and no pyenv."""
    command = f'. "{ROOT}/scripts/_environment.sh"; PATH="{path}"; find_python {wanted}'
    environ = os.environ | {"PYENV_ROOT": str(path / "none")}
    return subprocess.run(["bash", "-c", command], env=environ, capture_output=True, text=True)


def add_command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_find_python_passes_over_commands_that_do_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    add_command(folder, "python3.14", "exit 127")  # as a pyenv shim of a version that is not chosen
    add_command(folder, "python3.13", "echo 3.13 /not/asked")
    add_command(folder, "python3.12", "echo 3.12 /also/not/asked")
    found = find_python(folder)
    assert found.stdout == "3.13 /not/asked\n"
    assert find_python(folder, "3.12").stdout == "3.12 /also/not/asked\n"


def test_find_python_believes_the_interpreter_and_not_its_name(tmp_path: Path) -> None:
    add_command(tmp_path, "python3", f'exec "{sys.executable}" "$@"')
    version = "{}.{}".format(*sys.version_info)
    assert find_python(tmp_path).stdout.split(maxsplit=1)[0] == version
    assert find_python(tmp_path, str(tmp_path / "python3")).stdout.split(maxsplit=1)[0] == version


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("", "found no usable CPython among 3.14 3.13 3.12 3.11 on PATH and in pyenv; name one with --python PATH"),
        ("3.12", "found no usable CPython among 3.12"),
        ("nothing", "--python nothing: no such command"),
        ("false", "--python false: not a CPython 3.11 or newer"),
    ],
)
def test_find_python_says_what_is_missing(tmp_path: Path, wanted: str, message: str) -> None:
    add_command(tmp_path, "false", "exit 1")
    add_command(tmp_path, "basename", "echo test")
    found = find_python(tmp_path, wanted)
    assert found.returncode == 2
    assert message in found.stderr


# --- making an environment


@pytest.fixture
def environments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """_environment.py with an ``installs`` list in place of venv and pip."""
    module = load_script("_environment")
    module.installs = []

    def make(environment: Path, command: list[str]) -> None:
        (environment / "bin").mkdir(parents=True)
        (environment / "bin/python").symlink_to(sys.executable)

    monkeypatch.setattr(module, "run", make)
    monkeypatch.setattr(module, "install", lambda environment, extras, jax: module.installs.append(sorted(extras)))
    return module


def test_environment_is_made_once(environments: ModuleType, tmp_path: Path) -> None:
    environment = tmp_path / ".venv" / "py"
    environments.main(environment, set())
    environments.main(environment, set())
    assert environments.installs == [[]]


def test_environment_grows_and_keeps_what_it_has(environments: ModuleType, tmp_path: Path) -> None:
    environment = tmp_path / ".venv" / "py"
    environments.main(environment, {"test"})
    environments.main(environment, {"dev"})
    environments.main(environment, {"test"})
    assert environments.installs == [["test"], ["dev", "test"]]


def test_environment_follows_pyproject(
    environments: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = tmp_path / ".venv" / "py"
    environments.main(environment, {"test"})
    changed = tmp_path / "pyproject.toml"
    changed.write_text(environments.PYPROJECT.read_text() + "\n")
    monkeypatch.setattr(environments, "PYPROJECT", changed)
    environments.main(environment, set())
    assert environments.installs == [["test"], ["test"]]


def test_environment_cut_short_is_made_again(environments: ModuleType, tmp_path: Path) -> None:
    environment = tmp_path / ".venv" / "py"
    environments.main(environment, set())
    (environment / "half").touch()

    def cut_short(environment: Path, extras: set[str], jax: str) -> None:
        raise KeyboardInterrupt

    install, environments.install = environments.install, cut_short
    with pytest.raises(KeyboardInterrupt):
        environments.main(environment, {"test"})
    environments.install = install
    environments.main(environment, {"test"})
    assert environments.installs == [[], ["test"]]
    assert not (environment / "half").exists()


def test_environment_without_its_python_is_made_again(environments: ModuleType, tmp_path: Path) -> None:
    environment = tmp_path / ".venv" / "py"
    environments.main(environment, set())
    (environment / "bin/python").unlink()
    environments.main(environment, set())
    assert environments.installs == [[], []]


def test_a_version_of_jax_holds_its_compiler_too() -> None:
    pins = load_script("_environment").pins_of_jax
    assert pins({"test"}, "") == []
    assert pins({"test"}, "0.11.2") == ["jax==0.11.2", "jaxlib==0.11.2"]
    assert pins({"aot"}, "0.11.2")[2:] == ["jax-cuda13-plugin==0.11.2", "jax-cuda13-pjrt==0.11.2"]
