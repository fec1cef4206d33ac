"""One packed matrix in parts, as GPUs have it from XLA; run here on CPUs, with parts of a few outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.kernels.grouped_matmul import one_matrix
from jaxmoe.kernels.grouped_matmul.quantized import as_matrices
from tests.support.packed import Case, each_case, pack

R, N, K = 5, 192, 64


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """80 float32 outputs of 64 numbers, which neither the tile nor a block of 32 divides."""
    monkeypatch.setattr(one_matrix, "PART_BYTES", 80 * K * 4)
    monkeypatch.setattr(one_matrix, "_TILE", 16)


def product(stack, rows, size):
    @jax.jit
    def run(stack, rows):
        sizes = jnp.array([size], jnp.int32)
        return one_matrix.multiply_in_parts(rows, as_matrices(stack), sizes, jnp.dtype(jnp.float32))

    return run(stack, rows)


@pytest.mark.covering(most=6)
@each_case
def test_parts_make_the_whole_product(case) -> None:
    stack, exact = pack(case, 0, 1, N, K)
    rows = np.random.default_rng(1).standard_normal((R, K)).astype(np.float32)
    rows[R - 1] = np.nan  # no group's
    out = product(stack, rows, R - 1)
    np.testing.assert_allclose(out[: R - 1], rows[: R - 1] @ exact[0].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[R - 1], 0)


def test_a_matrix_is_rounded_to_the_rows_dtype() -> None:
    stack, exact = pack(Case("float8_e4m3fn", (1, 0)), 0, 1, N, K)
    one = jnp.zeros((1, K), jnp.bfloat16).at[0, 3].set(1)
    rounded = jnp.asarray(exact[0, :, 3], jnp.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(product(stack, one, 1)[0], rounded.astype(jnp.float32))


@pytest.mark.parametrize(
    ("sizes", "unit", "outputs"),
    [
        ((192, 16), 1, 192),  # all of it is small enough
        ((192, 64), 1, 80),
        ((192, 64), 32, 64),
        ((192, 64), 96, 96),  # a block is larger than a part
        ((192, 10**6), 1, 16),
        ((10, 10**6), 1, 10),  # fewer than a tile
    ],
)
def test_parts_are_of_whole_blocks(sizes, unit, outputs) -> None:
    assert one_matrix.outputs_per_part(*sizes, 4, unit) == outputs
