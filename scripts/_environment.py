"""Makes one environment under .venv/, or finds it finished. Called by _environment.sh; standard library only.

A finished environment carries a stamp that says what it was made from. The stamp is removed before anything changes
and written last, so that a set-up cut short is seen and started again; a lock lets one set-up run at a time.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
STAMP = "jaxmoe-stamp.json"


def main(environment: Path, extras: set[str], jax: str = "") -> None:
    """Leaves ``environment`` with jaxmoe (editable) and ``extras`` installed, and with version ``jax`` of JAX if given."""
    if is_ready(environment, extras):
        return
    environment.parent.mkdir(exist_ok=True)
    with locked(environment.with_name(environment.name + ".lock"), f"set-up of {environment.name}"):
        if is_ready(environment, extras):  # made while we waited
            return
        start = time.monotonic()
        stamp = read_stamp(environment)
        if stamp.get("base") == base() and runs(environment):
            say(f"bringing .venv/{environment.name} up to date with pyproject.toml")
            extras = extras | set(stamp["extras"])
            (environment / STAMP).unlink()
        else:
            version = sys.version.split()[0]
            say(f"making .venv/{environment.name} with Python {version} (takes a minute or two, once)")
            shutil.rmtree(environment, ignore_errors=True)
            run(environment, [sys.executable, "-I", "-m", "venv", str(environment)])
        install(environment, extras, jax)
        write_stamp(environment, {"base": base(), "pyproject": PYPROJECT.read_text(), "extras": sorted(extras)})
        say(f"ready after {time.monotonic() - start:.0f} s")


def base() -> dict[str, str]:
    """What an environment cannot outlive: its interpreter, and the folder that scripts and the install point to."""
    return {"python": sys.version, "executable": sys.executable, "checkout": str(ROOT)}


def is_ready(environment: Path, extras: set[str]) -> bool:
    """Whether ``environment`` was finished, from today's pyproject.toml, with at least ``extras``."""
    stamp = read_stamp(environment)
    return (
        stamp.get("base") == base()
        and stamp["pyproject"] == PYPROJECT.read_text()
        and extras <= set(stamp["extras"])
        and runs(environment)
    )


def read_stamp(environment: Path) -> dict:
    """The stamp, or an empty one if there is none that can be read."""
    try:
        return json.loads((environment / STAMP).read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(environment: Path, stamp: dict) -> None:
    """Writes the stamp whole or not at all."""
    partial = environment / (STAMP + ".partial")
    partial.write_text(json.dumps(stamp))
    partial.replace(environment / STAMP)


def runs(environment: Path) -> bool:
    """Whether the environment's Python starts, which it does not once the Python it was made from is gone."""
    try:
        return subprocess.run([environment / "bin/python", "-I", "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def install(environment: Path, extras: set[str], jax: str = "") -> None:
    """Installs jaxmoe with ``extras`` by pip; torch, where wanted, goes first with its pin.

    Modules are compiled when they are first imported: most of what comes along never is.
    """
    pip = [str(environment / "bin/python"), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    pip += ["--no-compile"]
    parity = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]["parity"]
    if "parity" in extras:
        torch = next(requirement for requirement in parity if requirement.startswith("torch=="))
        say(f"installing {torch}")
        run(environment, [*pip, torch])
    wanted = f"[{','.join(sorted(extras))}]" if extras else ""
    say(f"installing jaxmoe{wanted} and what it needs")
    run(environment, [*pip, "--editable", f"{ROOT}{wanted}", *pins_of_jax(extras, jax)])


def pins_of_jax(extras: set[str], jax: str) -> list[str]:
    """Requirements that hold JAX, and its compiler for GPUs where that is wanted, at one version."""
    parts = ["jax", "jaxlib", *(["jax-cuda13-plugin", "jax-cuda13-pjrt"] if "aot" in extras else [])]
    return [f"{part}=={jax}" for part in parts] if jax else []


def run(environment: Path, command: list[str]) -> None:
    """Runs ``command`` quietly; if it fails, shows the end of what it printed and exits."""
    log = environment.with_name(environment.name + ".log")
    with log.open("w") as output:
        process = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, close_fds=False
        )
    if process.returncode:
        lines = log.read_text(errors="replace").splitlines()
        print(*lines[-40:], sep="\n", file=sys.stderr)
        sys.exit(f"set-up failed ({log} has all of it): {' '.join(command)}")


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file ``path``; the system lets go of it when this process ends, however it ends."""
    with path.open("w") as file:
        os.set_inheritable(file.fileno(), True)  # pip holds it too, should it outlive this process
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def say(text: str) -> None:
    """One line of what is going on, on stderr: stdout belongs to the command that follows."""
    print(f"· {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), set(filter(None, sys.argv[2].split(","))), sys.argv[3])
    except KeyboardInterrupt:
        sys.exit("set-up interrupted; the next run starts it again")
