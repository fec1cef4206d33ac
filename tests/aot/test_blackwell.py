"""The Blackwell kernel through ptxas, at the shapes of published models.

Each in a process of its own: Mosaic GPU compiles all of a process for the first architecture it saw there, and that may
have been another test's Hopper.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxmoe.kernels.grouped_matmul import expert_mlp
from jaxmoe.planning.topology import gpu_topology

# Experts on a device, model width, expert width, activation and its limit, dtype of the result.
SHAPES = {
    "mixtral-8x7b": (8, 4096, 14336, "silu", None, "bfloat16"),
    # Partial sums where F is split over devices, in float32.
    "qwen3-30b-a3b, ep 8": (16, 2048, 768, "silu", None, "float32"),
    "gpt-oss, tp 2 ep 4": (32, 2880, 1440, "clamped_swiglu", 7.0, "bfloat16"),
}

pytestmark = [
    pytest.mark.covering,
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="the kernel needs jax 0.11.2"),
]


def compile_mlp(shape: str, rows: int, dtype: str) -> int:
    """Compile experts with biases; bytes of temporary memory."""
    G, D, F, activation, limit, out_dtype = SHAPES[shape]
    [device] = gpu_topology("b200", 1)

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=SingleDeviceSharding(device))

    def mlp(x, up, down, b_up, b_down, sizes):
        return expert_mlp(
            x, up, down, sizes, b_gate_up_p2F=b_up, b_down_pD=b_down, activation=activation, limit=limit,
            out_dtype=out_dtype, backend="mosaic_gpu", device_kind=device.device_kind,
        )  # fmt: skip

    arguments = (
        array(rows, D),
        array(G, 2, F, D),
        array(G, D, F),
        array(G, 2, F),
        array(G, D),
        array(G, dtype="int32"),
    )
    compiled = jax.jit(mlp).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("rows", "dtype"), [(64, "bfloat16"), (8192, "bfloat16"), (8192, "float16")])
@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes(shape, rows, dtype, gpu_compiler, monkeypatch, capfd) -> None:
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own_process:
        temp_bytes = own_process.submit(compile_mlp, shape, rows, dtype).result()
    said = "".join(capfd.readouterr())
    assert said.count("for 'sm_100a'") == 2, said
    assert said.count("0 bytes spill stores, 0 bytes spill loads") == 2, said
    # What stands between the products, the padded biases and the table of tiles: no copy of a row or a weight.
    G, D, F, *_ = SHAPES[shape]
    assert temp_bytes < rows * F * 2 + G * 3 * (F + D) * 2 + 2**18
