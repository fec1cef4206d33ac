"""The Triton kernel through Triton and ptxas, at the shapes of published models, for GPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxmoe
from jaxmoe.kernels.grouped_matmul import ACTIVATIONS, expert_mlp, grouped_matmul
from jaxmoe.models import get_family
from jaxmoe.planning.steps import compile_steps
from jaxmoe.planning.topology import gpu_topology
from tests.support.published import QWEN3_30B

# Experts on a device, model width, expert width, activation.
SHAPES = {
    "mixtral-8x7b": (8, 4096, 14336, "silu"),
    "qwen3-30b-a3b": (128, 2048, 768, "silu"),
    "qwen3-235b, ep 8": (16, 4096, 1536, "silu"),
    "deepseek-v3": (256, 7168, 2048, "silu"),  # offsets of 64 bits
    "deepseek-v3, ep 8": (32, 7168, 2048, "silu"),
    "gpt-oss-20b": (32, 2880, 2880, "clamped_swiglu"),
    "gpt-oss-120b": (128, 2880, 2880, "clamped_swiglu"),
}

_TARGET = 'custom_call_target="__gpu$xla.gpu.triton"'

pytestmark = [
    pytest.mark.covering,
    # Lowering says that Pallas Triton is to go. Nothing is there to take its place on GPUs before Hopper; and the warning
    # comes when JAX lowers a whole program, not when the kernel is called, so the kernel cannot hold it back.
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]


def compile_for(chip, function, *shapes_and_dtypes):
    """As on one such GPU, with arguments of these shapes."""
    mesh = jaxmoe.make_mesh(devices=list(gpu_topology(chip, 1)))
    on = NamedSharding(mesh, P())
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=on) for shape, dtype in shapes_and_dtypes]
    # Which GPU to lower for is asked of the mesh.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.compile()


def compile_mlp(chip, G, D, F, activation, rows, dtype=jnp.bfloat16, *, biases=True, gated=True, gathered=False):
    halves = 2 if gated else 1

    def mlp(x, up, down, sizes, *others):
        names = [*(("index_R",) if gathered else ()), "b_gate_up_p2F", "b_down_pD"]
        more = dict(zip(names, others, strict=False))
        limit = 7.0 if activation == "clamped_swiglu" else None
        return expert_mlp(x, up, down, sizes, activation=activation, limit=limit, backend="triton", **more)

    x = (-(-rows // 8) if gathered else rows, D)
    arguments = [(x, dtype), ((G, halves, F, D), dtype), ((G, D, F), dtype), ((G,), jnp.int32)]
    arguments += [((rows,), jnp.int32)] if gathered else []
    return compile_for(chip, mlp, *arguments, *([((G, halves, F), dtype), ((G, D), dtype)] if biases else []))


def count_kernels(compiled):
    return compiled.as_text().count(_TARGET)


@pytest.mark.parametrize("chip", ["a100", "h100"])
@pytest.mark.parametrize("rows", [64, 8192])
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize(("G", "D", "F", "activation"), SHAPES.values(), ids=SHAPES)
def test_published_shapes(G, D, F, activation, gathered, rows, chip, gpu_compiler) -> None:
    """Two kernels, and no memory beyond h: neither rows nor weights are copied, nor are rows gathered before."""
    options = {"biases": activation == "clamped_swiglu", "gathered": gathered}
    compiled = compile_mlp(chip, G, D, F, activation, rows, **options)
    assert count_kernels(compiled) == 2
    of_h, of_maps = rows * F * 2, 2**16
    assert compiled.memory_analysis().temp_size_in_bytes <= of_h + of_maps
    # The smallest matrix is larger than all the maps.
    assert of_maps < D * F * 2


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, gated, gpu_compiler) -> None:
    compiled = compile_mlp("a100", 4, 256, 128, activation, 16, gated=gated)
    assert count_kernels(compiled) == 2


@pytest.mark.parametrize("chip", ["a100", "h100"])
@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(("N", "K"), [(90, 45), (1, 1)])
def test_uneven_shapes(N, K, dtype, rows, chip, gpu_compiler) -> None:
    def product(lhs, rhs, sizes):
        return grouped_matmul(lhs, rhs, sizes, out_dtype=jnp.float32, backend="triton")

    assert count_kernels(compile_for(chip, product, ((rows, K), dtype), ((2, N, K), dtype), ((2,), jnp.int32)))


@pytest.mark.parametrize("precision", ["highest", "tensorfloat32"])
@pytest.mark.parametrize("rows", [16, 1024])
def test_float32_in_a_named_precision(precision, rows, gpu_compiler) -> None:
    with jax.default_matmul_precision(precision):
        assert count_kernels(compile_mlp("a100", 2, 512, 256, "silu", rows, jnp.float32))


@pytest.mark.parametrize("chip", ["a100", pytest.param("h100", marks=pytest.mark.full)])
def test_a_whole_model(chip, gpu_compiler) -> None:
    config = get_family("qwen3_moe").read_config(QWEN3_30B)
    mesh = jaxmoe.make_mesh(tp=2, ep=4, devices=list(gpu_topology(chip, 8)))
    steps = compile_steps(config, mesh, kernels="triton", batch_size=8, prompt_length=1024, max_length=2048)
    for step in steps.values():
        assert step.text.count(_TARGET) == 2
        # What a device holds of the experts is handed on, and never copied.
        stacks = (32, 2 * 384, 2048), (32, 2, 384, 2048), (32, 2048, 384)
        giving = {op for op, shape in step.arrays if shape in stacks}
        assert {"parameter"} <= giving <= {"parameter", "get-tuple-element", "tuple", "bitcast", "while"}
