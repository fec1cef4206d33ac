"""Eight simulated CPU devices for every test, and the meshes they make."""

import os
from importlib.metadata import version


def add_xla_flag(name: str, value: str) -> None:
    """Set a flag of XLA, unless XLA_FLAGS has it already. The backend reads them when it starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    if f"--{name}=" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --{name}={value}".strip()


# Before the first import of jax.
add_xla_flag("xla_force_host_platform_device_count", "8")
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import pytest
from jax.sharding import Mesh

from tests.support.meshes import MESH_SHAPES, mesh_of

hypothesis.settings.register_profile("default", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--dispatch-cases`, see tests/dispatch/test_routings.py; `--aot`, see tests/aot."""
    parser.addoption("--dispatch-cases", type=int, default=2000, help="routings drawn for the dispatch backends")
    parser.addoption(
        "--aot", action="store_true", help="fail where the compiler for GPUs is missing, instead of skipping"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Compile faster what is compiled once and runs for a moment: it is most of the time that tests take.

    Programs for GPUs are compiled as they are for users, and so is what tests start as processes of their own:
    commands, notebooks and hosts, which drop these flags.
    """
    if config.getoption("--aot"):
        return
    add_xla_flag("xla_backend_optimization_level", "0")
    add_xla_flag("xla_llvm_disable_expensive_passes", "true")
    if version("jaxlib").startswith("0.10."):  # jaxlib 0.12 has the slower emitters only
        add_xla_flag("xla_cpu_use_fusion_emitters", "false")


@pytest.fixture(params=MESH_SHAPES, ids=lambda shape: "dp{}-tp{}-ep{}".format(*shape))
def mesh(request) -> Mesh:
    """Each of the shared meshes over all eight devices."""
    return mesh_of(*request.param)
