"""The compiler for GPUs, which comes in wheels of its own."""

import pytest

from jaxmoe.planning.topology import gpu_topology


@pytest.fixture(scope="session")
def gpu_compiler(request) -> None:
    """Skip without the compiler, unless `--aot` says that it has to be here."""
    try:
        gpu_topology("h100", 1)
    except NotImplementedError as error:
        if request.config.getoption("--aot"):
            raise
        pytest.skip(str(error))
