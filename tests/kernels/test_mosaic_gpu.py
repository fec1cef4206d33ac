"""The Hopper kernel in Mosaic GPU's interpreter, against products in float64.

The interpreter runs the kernel's threads and barriers on the CPU. It says nothing of speed, and checks neither registers
nor what ptxas makes of it: tests/aot does that. It is slow, so shapes are small.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import MoEConfig
from jaxmoe.kernels.grouped_matmul import check_backend, expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.activations import combine_halves
from jaxmoe.layers import MoE
from tests.conftest import mesh_of

OLD = jax.__version_info__ < (0, 12)
needs_mosaic = pytest.mark.skipif(OLD, reason="Mosaic GPU's interpreter is used as jax 0.12 has it")

# Empty groups, groups of less than a tile and of more, a group over several tiles, rows that no group owns.
SIZES = [
    ([5, 0, 130, 1], 200, "bfloat16"),
    ([0, 0, 0], 20, "bfloat16"),
    ([300], 300, "float16"),
    ([1, 1, 1, 1], 4, "bfloat16"),
]


def arrays(R, *shapes, dtype):
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(R, shapes[0][-1]))
    return [jnp.asarray(rows, dtype), *(jnp.asarray(rng.normal(size=s) / np.sqrt(s[-1]), dtype) for s in shapes)]


def exact(rows, matrices, sizes):
    out, start = np.zeros((len(rows), matrices.shape[1])), 0
    for group, size in enumerate(sizes):
        out[start : start + size] = rows[start : start + size] @ matrices[group].T
        start += size
    return out


@needs_mosaic
@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "R", "dtype"), SIZES, ids=str)
def test_product(sizes, R, dtype) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu

    rows, matrices = arrays(R, (len(sizes), 96, 192), dtype=dtype)
    rows = rows.at[sum(sizes) :].set(jnp.nan)
    out = mosaic_gpu.grouped_matmul(
        rows, matrices, jnp.asarray(sizes, jnp.int32), out_dtype=jnp.dtype(jnp.float32), interpret=True
    )
    expected = exact(np.asarray(rows, np.float64), np.asarray(matrices, np.float64), sizes)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    assert not np.asarray(out)[sum(sizes) :].any()


@needs_mosaic
@pytest.mark.parametrize(
    ("activation", "limit", "gated"), [("silu", None, True), ("clamped_swiglu", 1.5, True), ("relu2", None, False)]
)
def test_mlp_with_biases(activation, limit, gated) -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu, portable

    sizes, halves, D, F = [7, 0, 70], 2 if gated else 1, 64, 32
    x, up, down, b_up, b_down = arrays(90, (3, halves * F, D), (3, D, F), (3, halves * F), (3, D), dtype=jnp.bfloat16)
    options = {
        "b_up_pN": b_up,
        "b_down_pD": b_down,
        "combine": combine_halves(activation, limit, gated=gated),
        "out_dtype": jnp.dtype(jnp.float32),
    }
    group_sizes = jnp.asarray(sizes, jnp.int32)
    out = mosaic_gpu.expert_mlp(x, up, down, group_sizes, **options, interpret=True)
    expected = portable.expert_mlp(x, up, down, group_sizes, **options)
    # Both round h to bfloat16; where that falls to different sides, by one part in 2^8 of one of F terms.
    np.testing.assert_allclose(out, expected, atol=2e-3)


@needs_mosaic
def test_gradient_is_that_of_the_portable_backend() -> None:
    from jaxmoe.kernels.grouped_matmul import mosaic_gpu, portable

    rows, matrices = arrays(70, (2, 32, 64), dtype=jnp.bfloat16)
    options = {"group_sizes_G": jnp.asarray([3, 60], jnp.int32), "out_dtype": jnp.dtype(jnp.float32)}

    def total(function, **more):
        return jax.grad(lambda rows, matrices: jnp.sum(function(rows, matrices, **options, **more) ** 2), (0, 1))

    got = total(mosaic_gpu.grouped_matmul, interpret=True)(rows, matrices)
    expected = total(portable.grouped_matmul)(rows, matrices)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=2e-2, atol=2e-2)


@needs_mosaic
@pytest.mark.parametrize(
    ("dtype", "N", "K", "message"),
    [
        (jnp.float32, 64, 64, "multiplies bfloat16 and float16; got float32"),
        (jnp.bfloat16, 40, 64, "got N=40, K=64: use the portable one"),
        (jnp.bfloat16, 64, 48, "got N=64, K=48"),
    ],
)
def test_what_it_does_not_multiply(dtype, N, K, message) -> None:
    rows, matrices = arrays(8, (1, N, K), dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        grouped_matmul(rows, matrices, jnp.asarray([8], jnp.int32), backend="mosaic_gpu")


def test_a_layer_refuses_it_where_it_cannot_run() -> None:
    config = MoEConfig(num_experts=4, num_experts_per_tok=2, hidden_size=64, moe_intermediate_size=32)
    message = "need jax 0.12 or newer" if OLD else r"run on Hopper GPUs \(H100, H200\); these devices are cpu"
    with pytest.raises(NotImplementedError, match=message):
        MoE(config, mesh=mesh_of(1, 1, 4), kernels="mosaic_gpu")
    with pytest.raises(ValueError, match=r"one of \['mosaic_gpu', 'portable', 'reference'\]; got 'fast'"):
        check_backend("fast", jax.devices()[0])
    with pytest.raises(ValueError, match="got 'fast'"):
        expert_mlp(
            *arrays(4, (1, 2, 32, 64), (1, 64, 32), dtype=jnp.bfloat16), jnp.asarray([4], jnp.int32), backend="fast"
        )
