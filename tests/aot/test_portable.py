"""Packed experts as XLA compiles them for GPUs that have no kernel for them: no stack is decoded."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from jaxmoe.kernels.grouped_matmul import QuantizedStack, expert_mlp
from jaxmoe.kernels.grouped_matmul.quantized import FORMATS
from jaxmoe.planning.topology import gpu_topology

# Experts on a device, matrices of the first product, model width, expert width; format, block and dtype of the scales.
CASES = {
    "gpt-oss-20b": (32, 2, 2880, 2880, "mxfp4", (1, 32), "uint8"),
    "deepseek-v3, ep 8": (32, 2, 7168, 2048, "float8_e4m3fn", (128, 128), "float32"),
    "qwen3-30b-a3b": (128, 2, 2048, 768, "float8_e4m3fn", (128, 128), "bfloat16"),
    "kimi-k2.5, ep 8": (48, 2, 7168, 2048, "int4", (1, 32), "bfloat16"),
    "qwen3-235b, ep 8": (16, 2, 4096, 1536, "nvfp4", (1, 16), "float8_e4m3fn"),
    "nemotron-3-nano, ep 8": (16, 1, 2688, 1856, "nvfp4", (1, 16), "float8_e4m3fn"),
}


@pytest.mark.covering(most=6)
@pytest.mark.parametrize("rows", [8, 2048])
@pytest.mark.parametrize("chip", ["a100", "b200"])
@pytest.mark.parametrize("case", CASES)
def test_no_stack_is_decoded(case, chip, rows, gpu_compiler) -> None:
    G, halves, D, F, format, block, scale_dtype = CASES[case]
    on = SingleDeviceSharding(gpu_topology(chip, 1)[0])

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=on)

    def packed(*shape):
        *lead, N, K = shape
        return QuantizedStack(
            values=array(FORMATS[format].dtype, *lead, N, K // FORMATS[format].per_byte),
            scales=array(scale_dtype, *lead, N // block[0], K // block[1]),
            matrix_scales=array("float32", *lead) if format == "nvfp4" else None,
            format=format,
            block=block,
        )

    def mlp(x, up, down, sizes):
        return expert_mlp(x, up, down, sizes, activation="silu" if halves == 2 else "relu2", backend="portable")

    stacks = packed(G, halves, F, D), packed(G, D, F)
    arguments = (array("bfloat16", rows, D), *stacks, array("int32", G))
    memory = jax.jit(mlp).trace(*arguments).lower(lowering_platforms=("cuda",)).compile().memory_analysis()
    weights = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(stacks))
    assert weights <= memory.argument_size_in_bytes < weights + rows * D * 2 + 2**16
    # One expert in float32 and the rows, each at most a few times.
    assert memory.temp_size_in_bytes < 3 * (halves + 1) * F * D * 4 + 4 * rows * (D + 2 * F) * 4
