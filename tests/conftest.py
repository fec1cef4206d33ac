"""Eight simulated CPU devices for every test, and the meshes they make."""

import math
import os

# Before the first import of jax: the device count is fixed when its backend starts.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import pytest
from jax.sharding import Mesh

from jaxmoe import make_mesh

hypothesis.settings.register_profile("default", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("default")

MESH_SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--dispatch-cases`, see tests/dispatch/test_routings.py; `--aot`, see tests/aot."""
    parser.addoption("--dispatch-cases", type=int, default=2000, help="routings drawn for the dispatch backends")
    parser.addoption(
        "--aot", action="store_true", help="fail where the compiler for GPUs is missing, instead of skipping"
    )


def mesh_of(dp: int, tp: int, ep: int) -> Mesh:
    """A mesh over as many of the simulated devices as it needs."""
    return make_mesh(dp, tp, ep, devices=jax.devices()[: math.prod((dp, tp, ep))])


@pytest.fixture(params=MESH_SHAPES, ids=lambda shape: "dp{}-tp{}-ep{}".format(*shape))
def mesh(request) -> Mesh:
    """Each of the shared meshes over all eight devices."""
    return mesh_of(*request.param)
