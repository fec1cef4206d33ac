"""Verdicts on backends: whether one gives right results on the GPU at hand, found out once and remembered.

A trial runs in a process of its own, with a time limit, before weights are loaded. What it says is kept for this process,
which never changes its mind, and in a file of the user's cache for the next one: for the kind of device, the versions of jax
and of the driver, and the sources of the kernels, so that a change of any of them asks for new trials.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxmoe import distributed
from jaxmoe.kernels.grouped_matmul.backends import BACKENDS, GPU_BACKENDS, compute_capability
from jaxmoe.kernels.grouped_matmul.tile_table import tuned_backends
from jaxmoe.kernels.grouped_matmul.work import TOLERANCES, Outcome, Work
from jaxmoe.mesh import is_present
from jaxmoe.user_files import cache_folder

# Seconds that a trial may take: to start, and for each work, most of it for compilers.
START_SECONDS, WORK_SECONDS = 90, 45
# Backends in the order in which "auto" would have them, where none was measured; "portable" runs everywhere.
ORDER = ("mosaic_gpu", "triton", "xla_ragged_dot")
_FUSION = "xla_gpu_experimental_use_ragged_dot_fusion"

# From backend and work to what a trial says of them.
Verdicts = dict[tuple[str, Work], Outcome]
# Holds a backend's trials of some work; one outcome for each, in order.
RunTrials = Callable[[str, Sequence[Work], jax.Device], list[Outcome]]

# By kind of device: verdicts that this process goes by.
_known: dict[str, Verdicts] = {}


def known_verdicts(device_kind: str | None) -> Mapping[tuple[str, Work], Outcome]:
    """The verdicts that this process goes by on a kind of device; none before `hold_trials`."""
    return _known.get(device_kind or "", {})


def candidates(device: jax.Device) -> tuple[str, ...]:
    """Backends of `ORDER` that a device may run; XLA's ragged dot where it is fused, which a flag of XLA asks for."""
    capability = compute_capability(device)
    flag = next((flag for flag in os.environ.get("XLA_FLAGS", "").split() if _FUSION in flag), "=false")
    runs = {
        name: capability in backend.capabilities and jax.__version_info__ >= backend.since
        for name, backend in GPU_BACKENDS.items()
    }
    runs["xla_ragged_dot"] = capability > 0 and not flag.lower().endswith(("=false", "=0"))
    return tuple(name for name in ORDER if runs[name])


def hold_trials(mesh: Mesh | AbstractMesh, works: Iterable[Work], *, run: RunTrials | None = None) -> None:
    """Find out what the GPUs of a mesh can be trusted with; without GPUs of this machine there is nothing to find out.

    For each work the candidates are tried in order, up to the first that is right, and besides those that were tuned for
    this kind of device; one that has kernels for the work's gradient is tried with that, too. All processes call it alike:
    process 0 finds out for all of them.

    Args:
        mesh: mesh whose devices are of one kind.
        works: work that will be asked for.
        run: function that holds trials; by default each candidate's run in a process of its own.

    Raises:
        ValueError: processes have devices of different kinds.
    """
    if isinstance(mesh, AbstractMesh) or not is_present(mesh.devices.flat[0]):
        return
    device = (mesh.local_devices or jax.local_devices())[0]
    names = candidates(device)
    if not names:
        return
    verdicts = _known.setdefault(device.device_kind, {})
    works = [work for work in dict.fromkeys(works) if work.rows in TOLERANCES and (names[0], work) not in verdicts]
    if mesh.is_multi_process:
        distributed.check_same({"kinds of devices": device.device_kind, "products to try": sorted(map(str, works))})
    if not works:
        return
    found: Verdicts = {}
    if distributed.is_first():
        found = _find_out(device, names, works, run or run_in_processes)
    if mesh.is_multi_process:
        found = _from_first(found)
    verdicts.update(found)


def _find_out(device: jax.Device, names: Sequence[str], works: Sequence[Work], run: RunTrials) -> Verdicts:
    file = verdict_file(device)
    cached = read_verdicts(file)
    found: Verdicts = {}
    tuned = tuned_backends(device.device_kind)
    remaining = list(works)
    for name in names:
        backend = {**BACKENDS, **GPU_BACKENDS}[name]
        missing = GPU_BACKENDS[name].missing if name in GPU_BACKENDS else ""
        wanted = list(works if name in tuned else remaining)
        # Last, so that one that hangs or crashes has kept nothing from being tried.
        wanted += [work.of_gradient for work in wanted if backend.may_have_gradient(work)]
        for work in wanted:
            if packed := {kind.form for kind in work.matrices if kind.is_packed} - backend.formats:
                found[name, work] = Outcome("refused", f"it takes no matrices packed as {' or '.join(sorted(packed))}")
            elif missing:  # not kept in the file: it may be there next time
                found[name, work] = Outcome("refused", missing)
            elif (name, work) in cached:
                found[name, work] = cached[name, work]
        untried = [work for work in wanted if (name, work) not in found]
        if untried:
            tried = dict(zip([(name, work) for work in untried], run(name, untried, device), strict=True))
            found |= tried
            cached |= {key: outcome for key, outcome in tried.items() if outcome.verdict != "untested"}
            write_verdicts(file, device, cached)
        remaining = [work for work in remaining if found[name, work].verdict != "right"]
    return found


def run_in_processes(
    backend: str, works: Sequence[Work], device: jax.Device, *, command: Sequence[str] | None = None
) -> list[Outcome]:
    """Hold a backend's trials in a process of its own, and in another one after each that crashes or hangs.

    Args:
        backend: name of the backend.
        works: work to try.
        device: device to try it on.
        command: program, given the backend's name, that reads lines of work and prints outcomes; by default `trial`.
    """
    command = command or (sys.executable, "-m", "jaxmoe.kernels.grouped_matmul.trial")
    outcomes: list[Outcome] = []
    while len(outcomes) < len(works):
        rest = works[len(outcomes) :]
        limit = START_SECONDS + WORK_SECONDS * len(rest)
        printed, errors, status = _run(
            [*command, backend], "".join(f"{work.to_json()}\n" for work in rest), device, limit
        )
        done = [Outcome(**fields) for line in printed.splitlines() if (fields := _outcome_in(line))][: len(rest)]
        outcomes += done
        if len(done) == len(rest):
            break
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "nothing on stderr")[:300]
        if status is None:
            outcomes.append(Outcome("hung", f"no result after {limit} s"))
        elif not done and status == 1:
            # Not a kernel: Python, jax or the device would not start.
            outcomes += [Outcome("untested", f"the trial did not start: {last}")] * len(rest)
        else:
            outcomes.append(Outcome("crashed", f"exit status {status}: {last}"))
    return outcomes


def _run(command: Sequence[str], work: str, device: jax.Device, limit: float) -> tuple[str, str, int | None]:
    """Give what a program printed on stdout and stderr, and its exit status; None if its time was over."""
    environment = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "CUDA_VISIBLE_DEVICES": _visible(device),
        "PYTHONPATH": os.pathsep.join(filter(None, [*_package_root(), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        printed, errors = process.communicate(work, timeout=limit)
    except subprocess.TimeoutExpired:
        _kill_group(process)
        printed, errors = process.communicate()
        return printed, errors, None
    except BaseException:
        _kill_group(process)
        process.wait()
        raise
    return printed, errors, process.returncode


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _package_root() -> list[str]:
    """The folder that jaxmoe is imported from, so that the trial runs the same sources."""
    return [str(Path(__file__).resolve().parents[3])]


def _visible(device: jax.Device) -> str:
    """The value of CUDA_VISIBLE_DEVICES that leaves one device."""
    index = getattr(device, "local_hardware_id", None) or 0
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[index] if index < len(visible) else str(index)


def _outcome_in(line: str) -> dict[str, str] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and fields.keys() == {"verdict", "detail"} else None


@cache
def sources_digest() -> str:
    """A digest of the sources of the kernels."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def environment_of(device: jax.Device) -> dict[str, str]:
    """Everything besides the work that a verdict depends on."""
    driver = Path("/proc/driver/nvidia/version")
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "platform": device.client.platform_version,
        "driver": driver.read_text().splitlines()[0] if driver.exists() else "",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "sources": sources_digest(),
    }


def verdict_file(device: jax.Device) -> Path:
    """The file of the user's cache with verdicts on this device, these versions and these kernels."""
    digest = hashlib.sha256(json.dumps(environment_of(device), sort_keys=True).encode()).hexdigest()
    return cache_folder() / "kernel_verdicts" / f"{digest[:16]}.json"


def read_verdicts(file: Path) -> Verdicts:
    """The verdicts of a file; none if it is not there or is none of these."""
    try:
        lines = json.loads(file.read_text())["verdicts"]
        return {
            (line["backend"], Work.from_json(line["work"])): Outcome(line["verdict"], line["detail"]) for line in lines
        }
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def write_verdicts(file: Path, device: jax.Device, verdicts: Verdicts) -> None:
    """Put verdicts into a file, all of them or none; without a place to write to they last as long as the process."""
    lines = [
        {"backend": backend, "work": work.to_json(), **dataclasses.asdict(outcome)}
        for (backend, work), outcome in verdicts.items()
    ]
    text = json.dumps({**environment_of(device), "verdicts": lines}, indent=1) + "\n"
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            unfinished.write_text(text)
            unfinished.replace(file)
        finally:
            unfinished.unlink(missing_ok=True)


def _from_first(found: Verdicts) -> Verdicts:
    """The verdicts of process 0, in every process."""
    lines = [[backend, work.to_json(), outcome.verdict, outcome.detail] for (backend, work), outcome in found.items()]
    text = np.frombuffer(json.dumps(lines).encode(), np.uint8)
    size = int(distributed.broadcast(np.asarray(len(text), np.int32)))
    text = distributed.broadcast(np.resize(text, size))
    return {
        (backend, Work.from_json(work)): Outcome(verdict, detail)
        for backend, work, verdict, detail in json.loads(text.tobytes())
    }
