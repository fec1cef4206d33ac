"""The number of multiprocessors, asked of the GPU at hand or known of one that is compiled for, and CUDA's libdevice."""

import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.hardware import GPUS
from jaxmoe.kernels.grouped_matmul import check_backend, expert_mlp, gpu
from tests.support.kernels import needs_mosaic

# As they are where they are known, and a GPU that is at hand alone: a part of an H100.
MIG = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
NUMBERS = {"NVIDIA H100 80GB HBM3": 132, "NVIDIA H100 PCIe": 114, "NVIDIA H20": 78, "NVIDIA H200 NVL": 132, MIG: 16}


@pytest.fixture
def part_of_a_gpu(monkeypatch):
    """This process has a GPU that no table knows."""
    here = SimpleNamespace(device_kind=MIG, core_count=NUMBERS[MIG])
    gpu.multiprocessors.cache_clear()
    monkeypatch.setattr(gpu, "_present_gpus", lambda: [here])
    yield
    gpu.multiprocessors.cache_clear()


@pytest.mark.parametrize("kind", NUMBERS)
def test_the_device_says_how_many(kind, part_of_a_gpu) -> None:
    assert gpu.multiprocessors(kind) == NUMBERS[kind]
    assert gpu.multiprocessors(kind, GPUS["b200"]) == NUMBERS[kind]


def test_where_the_kind_is_not_known(part_of_a_gpu, monkeypatch) -> None:
    assert gpu.multiprocessors("NVIDIA X1") == 132
    assert gpu.multiprocessors("NVIDIA X1", GPUS["b200"]) == 148
    assert gpu.multiprocessors(None) == NUMBERS[MIG]
    gpu.multiprocessors.cache_clear()
    monkeypatch.setattr(gpu, "_present_gpus", list)
    assert gpu.multiprocessors(None, GPUS["b200"]) == 148


@needs_mosaic
@pytest.mark.parametrize(("kind", "blocks"), [*NUMBERS.items(), ("NVIDIA B200", 148), ("NVIDIA GB300", 148)])
def test_a_kernel_has_a_block_for_each(kind, blocks, part_of_a_gpu) -> None:
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in ((16, 64), (2, 2, 128, 64), (2, 64, 128))]
    sizes = jnp.array([3, 5], jnp.int32)
    jaxpr = jax.make_jaxpr(lambda *args: expert_mlp(*args, sizes, backend="mosaic_gpu", device_kind=kind))(*arrays)
    assert set(re.findall(r"Mesh\(grid=\((\d+),\)", str(jaxpr))) == {str(blocks)}


@needs_mosaic
def test_a_kernel_that_would_abort_the_process_is_refused(tmp_path, monkeypatch) -> None:
    toolkits = tmp_path / "usr" / "local" / "cuda", tmp_path / "opt" / "cuda"
    monkeypatch.setattr(gpu, "_TOOLKITS", toolkits)
    monkeypatch.setattr(gpu, "_WHEELS", ("no_such_namespace.cu13", "wheels.cuda_nvcc"))
    h100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0")
    message = (
        rf"'mosaic_gpu' cannot be compiled here: .* {toolkits[0]}, {toolkits[1]}: pip install nvidia-cuda-nvcc, or make"
    )
    with pytest.raises(NotImplementedError, match=message):
        check_backend("mosaic_gpu", h100)
    check_backend("triton", h100)

    def put_into(folder) -> None:
        (folder / gpu._LIBDEVICE).parent.mkdir(parents=True)
        (folder / gpu._LIBDEVICE).touch()

    # Where a wheel has it, which is a namespace package; it may lie in one of several folders.
    wheel = tmp_path / "site" / "wheels" / "cuda_nvcc"
    put_into(wheel)
    with monkeypatch.context() as installed:
        installed.syspath_prepend(tmp_path / "site")
        check_backend("mosaic_gpu", h100)
    for name in ("wheels", "wheels.cuda_nvcc"):
        sys.modules.pop(name, None)
    put_into(toolkits[1])
    check_backend("mosaic_gpu", h100)
