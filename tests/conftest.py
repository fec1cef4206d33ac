"""Eight simulated CPU devices for every test, and the meshes they make."""

import gc
import importlib.util
import itertools
import os
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path


def add_xla_flag(name: str, value: str) -> None:
    """Set a flag of XLA, unless XLA_FLAGS has it already. The backend reads them when it starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if f"--{name}=" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


# Before the first import of jax. `scripts/test --gpu` leaves the platform alone; pytest has not read its options yet.
ON_GPU = "--gpu" in sys.argv
add_xla_flag("xla_force_host_platform_device_count", "8")
if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
# Two threads a device, however few cores there are: see `jaxmoe.simulate_devices`.
os.environ.setdefault("PJRT_NPROC", "16")
# Programs need not know the hundred frames of Python that each of their operations came from: to write them takes a while.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Commands that tests run here would keep programs in the user's cache folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from tests.support import runs
from tests.support.covering import covering, factors
from tests.support.meshes import MESH_SHAPES, mesh_of

hypothesis.settings.register_profile("default", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("default")


HAS_PARITY = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
RUNS = {
    "--full": "everything: whole products of cases, more random ones, and what takes long",
    "--parity": "live comparisons with torch and transformers",
    "--aot": "kernels and models compiled for GPUs that need not be there",
    "--gpu": "kernels on the GPU at hand",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--full` for everything; `--dispatch-cases`, see tests/dispatch/test_routings.py; `--aot`, see tests/aot."""
    parser.addoption("--full", action="store_true", help="run everything, not the short run's choice of it")
    parser.addoption("--dispatch-cases", type=int, default=None, help="routings drawn for the dispatch backends")
    parser.addoption("--gpu", action="store_true", help="leave the platform to jax, and run tests/gpu")
    parser.addoption(
        "--aot", action="store_true", help="fail where the compiler for GPUs is missing, instead of skipping"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compile faster what is compiled once and runs for a moment: it is most of the time that tests take.

    Programs for GPUs are compiled as they are for users, and so is, in the full run, what tests start as processes of
    their own: see `tests.support.processes.environment`.
    """
    runs.full = config.getoption("--full")
    runs.live = runs.full and HAS_PARITY
    # Tracing makes many objects that stay, over which the collector would go again and again: an eighth of the time.
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)
    if config.getoption("--aot"):
        # XLA would compile each product in several ways, and without a GPU has no times to choose one of them by.
        add_xla_flag("xla_gpu_autotune_level", "0")
    if config.getoption("--aot") or config.getoption("--gpu"):
        return
    add_xla_flag("xla_backend_optimization_level", "0")
    add_xla_flag("xla_llvm_disable_expensive_passes", "true")
    add_xla_flag("xla_cpu_parallel_codegen_split_count", "1")  # workers fill the cores; parts of a program cost a tenth
    if version("jaxlib").startswith("0.10."):  # jaxlib 0.12 has the slower emitters only
        add_xla_flag("xla_cpu_use_fusion_emitters", "false")


# Linux gives a process 65,530 memory maps, and a compiled program takes about a dozen: a worker that ran all of its tests
# with all of its programs would be ended in the middle of one.
MAPS = Path("/proc/self/maps")
CACHE_SETTINGS = {
    "jax_compilation_cache_dir": None,
    "jax_compilation_cache_max_size": -1,
    "jax_enable_compilation_cache": True,
    "jax_persistent_cache_min_compile_time_secs": 1.0,
}
TESTS_BETWEEN_LOOKS, ENOUGH_MAPS = 20, 20_000
tests_run = itertools.count(1)


def pytest_runtest_logfinish() -> None:
    """Let go of compiled programs where they have become many."""
    if (
        next(tests_run) % TESTS_BETWEEN_LOOKS == 0
        and MAPS.exists()
        and len(MAPS.read_bytes().splitlines()) > ENOUGH_MAPS
    ):
        jax.clear_caches()


@pytest.fixture(params=MESH_SHAPES, ids=lambda shape: "dp{}-tp{}-ep{}".format(*shape))
def mesh(request) -> Mesh:
    """Each of the shared meshes over all eight devices."""
    return mesh_of(*request.param)


# Tests left out of a run, by the option of scripts/test that runs them. Workers hand theirs to the process that prints.
NOT_RUN: pytest.StashKey[dict[str, int]] = pytest.StashKey()


def why_not(item: pytest.Item, config: pytest.Config) -> str | None:
    """The option that a test of another run waits for; None for a test of this run."""
    if "tests/aot" in item.path.as_posix() and not config.getoption("--aot"):
        return "--aot"
    if "tests/gpu/" in item.path.as_posix() and not config.getoption("--gpu"):
        return "--gpu"
    if item.get_closest_marker("parity") and not HAS_PARITY:
        return "--parity"
    return None


def beyond_short_run(items: list[pytest.Item]) -> set[pytest.Item]:
    """Tests marked `full`, and the cases of those marked `covering` that its covering set does without.

    Refusals, whose cases have a `message`, are cheap and stay whole.
    """
    beyond = {item for item in items if item.get_closest_marker("full")}
    by_function: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases = getattr(item, "callspec", None)
        if item not in beyond and item.get_closest_marker("covering") and cases and "message" not in cases.params:
            by_function.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in by_function.values():
        options = cases[0].get_closest_marker("covering").kwargs
        chosen = covering([factors(item.callspec.params) for item in cases], **options)
        beyond |= {*cases} - {cases[i] for i in chosen}
    return beyond


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to another run, and count it."""
    left_out = {item: option for item in items if (option := why_not(item, config))}
    if not config.getoption("--full"):
        here = [item for item in items if item not in left_out]
        left_out |= dict.fromkeys(beyond_short_run(here), "--full")
    if left_out:
        config.hook.pytest_deselected(items=[*left_out])
        items[:] = [item for item in items if item not in left_out]
    counts = {option: list(left_out.values()).count(option) for option in sorted(set(left_out.values()))}
    config.stash[NOT_RUN] = counts
    if hasattr(config, "workeroutput"):
        config.workeroutput["not_run"] = counts


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Every worker of pytest-xdist collects the same tests, so the last one's counts are those of all."""
    if counts := getattr(node, "workeroutput", {}).get("not_run"):
        node.config.stash[NOT_RUN] = counts


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was not run and how to run it."""
    counts = config.stash.get(NOT_RUN, {})
    if not HAS_PARITY:
        counts.pop("--parity", None)  # most of them cannot even be collected
        terminalreporter.write_line(f"not run: {RUNS['--parity']} (scripts/test --parity)")
    for option, count in counts.items():
        terminalreporter.write_line(f"not run: {count} tests, {RUNS[option]} (scripts/test {option})")


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    """JAX as it starts, without a cache, and a home of its own."""
    before = {name: getattr(jax.config, name) for name in CACHE_SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    compilation_cache.reset_cache()
    for name, value in CACHE_SETTINGS.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def jax_events():
    """Counts of what JAX says that it did."""
    found: Counter[str] = Counter()

    def listen(event, *_, **__):
        found[event.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listen)
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_listener(listen)
    jax.monitoring.unregister_event_duration_listener(listen)
