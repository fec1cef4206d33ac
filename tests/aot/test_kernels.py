"""The Hopper kernel through ptxas, at the shapes of published models, alone and inside a whole one."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import jaxmoe
from jaxmoe.kernels.grouped_matmul import expert_mlp
from jaxmoe.models import get_family
from jaxmoe.plan.steps import compile_steps
from jaxmoe.plan.topology import gpu_topology
from tests.aot.published import QWEN3_30B

# Experts on a device, model width, expert width, activation.
SHAPES = {
    "mixtral-8x7b": (8, 4096, 14336, "silu"),
    "qwen3-30b-a3b, ep 8": (16, 2048, 768, "silu"),
    "qwen3-235b, ep 8": (16, 4096, 1536, "silu"),
    "deepseek-v3, ep 8": (32, 7168, 2048, "silu"),
    "gpt-oss, ep 8": (16, 2880, 2880, "silu"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="the kernel needs jax 0.12"),
]


@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize(("G", "D", "F", "activation"), SHAPES.values(), ids=SHAPES)
def test_published_shapes(G, D, F, activation, rows, gpu_compiler) -> None:
    on = SingleDeviceSharding(gpu_topology("h100", 1)[0])

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=on)

    def mlp(x, up, down, sizes):
        return expert_mlp(x, up, down, sizes, activation=activation, backend="mosaic_gpu")

    arguments = (array(rows, D), array(G, 2, F, D), array(G, D, F), array(G, dtype=jnp.int32))
    compiled = jax.jit(mlp).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
    # The rows laid out anew and what stands between the products, in float32; no copy of a weight.
    places = rows + 256 * G
    assert compiled.memory_analysis().temp_size_in_bytes < places * (4 * D + 8 * F) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * G * F * D * 2 or rows > 64


def test_a_whole_model(gpu_compiler) -> None:
    config = get_family("qwen3_moe").read_config(QWEN3_30B)
    mesh = jaxmoe.make_mesh(tp=2, ep=4, devices=list(gpu_topology("h100", 8)))
    steps = compile_steps(config, mesh, kernels="mosaic_gpu", batch_size=8, prompt_length=1024, max_length=2048)
    for step in steps.values():
        assert "mosaic_gpu" in step.text
