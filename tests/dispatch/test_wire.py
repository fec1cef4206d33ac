"""Rows in eight bits on the wire: how far off, how many bytes, and what gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.dispatch import expected_bytes
from jaxmoe.dispatch.wire import pack_rows, unpack_rows
from tests.support.dispatch_programs import Program, program, promised
from tests.support.hlo import collectives
from tests.support.meshes import mesh_of
from tests.support.routings import draw_ids

pytestmark = pytest.mark.covering(most=2)

FP8 = "float8_e4m3fn"


def through_the_wire(x_TD: np.ndarray) -> np.ndarray:
    bits_TD, scale_T1 = pack_rows(jnp.asarray(x_TD), FP8)
    assert bits_TD.dtype == jnp.uint8
    return np.asarray(unpack_rows(bits_TD, scale_T1, FP8, x_TD.dtype))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_rounding_is_bounded_for_rows_of_any_size(scale):
    """Half a step of 3 mantissa bits, or half the smallest subnormal of a row scaled to at most 448."""
    x_TD = (np.random.default_rng(0).standard_cauchy(size=(64, 256)) * scale).astype(np.float32)
    x_TD[3] = 0
    error = np.abs(through_the_wire(x_TD) - x_TD)
    largest_T1 = np.abs(x_TD).max(axis=1, keepdims=True)
    assert (error <= np.maximum(np.abs(x_TD) * 2**-4, largest_T1 / 448 * 2**-10) * 1.001).all()
    assert not error[3].any()


@pytest.mark.parametrize("largest", [1e-37, 1e-40, 0.0])
def test_rows_whose_scale_would_be_subnormal_stay_finite(largest):
    x_TD = np.linspace(-largest, largest, 16, dtype=np.float32)[None]
    error = np.abs(through_the_wire(x_TD) - x_TD)
    assert error.max() <= max(largest * 2**-4, np.finfo(np.float32).tiny)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("backend", ["all_to_all", "ragged_all_to_all"])
@pytest.mark.parametrize("mesh_shape", [(1, 1, 8), (2, 2, 2)])
def test_experts_see_rounded_rows_and_nothing_else_changes(backend, mesh_shape):
    run = Program(backend=backend, mesh_shape=mesh_shape, expert_axes=("ep",), T=72, tight=True, wire_dtype=FP8)
    ids_TK = draw_ids("zipf", 0, run.T, run.K, 8)
    weights_TK = np.random.default_rng(0).dirichlet(np.ones(run.K), size=run.T).astype(np.float32)
    y_TD, stats = run(run.slots(ids_TK), weights_TK)
    assert int(stats.rounds) == run.expected_rounds(run.slots(ids_TK)) > 1
    exact = run.expected(ids_TK, weights_TK)
    error = np.sqrt(np.mean((y_TD - exact) ** 2) / np.mean(exact**2))
    assert 1e-3 < error < 0.05

    x_TD, *stacks = run.inputs
    rounded = Program(backend=backend, mesh_shape=mesh_shape, expert_axes=("ep",), T=72)
    rounded.__dict__["inputs"] = (through_the_wire(x_TD), *stacks)
    np.testing.assert_allclose(y_TD, rounded.expected(ids_TK, weights_TK), atol=1e-5)


def test_bytes_on_the_wire():
    run = program(backend="all_to_all", mesh_shape=(2, 2, 2), expert_axes=("ep",), wire_dtype=FP8)
    assert collectives(run.compiled.as_text()) == promised(run)
    shape = dataclasses.replace(run.shape, itemsize=2)
    there, _, gathered, *_, back = run.dispatch.collectives(shape)
    plain = run.dispatch.collectives(
        dataclasses.replace(shape, layout=dataclasses.replace(run.layout, wire_dtype=None))
    )
    for each in (there, gathered):
        assert each.bytes * 2 in [other.bytes for other in plain]
    assert back.bytes == 2 * there.bytes
    assert expected_bytes((there,)).payload * 2 == pytest.approx(expected_bytes((back,)).payload)


@pytest.mark.full
def test_gradient_is_that_of_rows_sent_as_they_are():
    config = jaxmoe.MoEConfig(num_experts=11, num_experts_per_tok=3, hidden_size=16, moe_intermediate_size=8)
    x_TD = np.random.default_rng(0).normal(size=(24, 16)).astype(np.float32)
    gradients = []
    for wire_dtype in (None, FP8):
        layer = jaxmoe.MoE(
            config, mesh=mesh_of(1, 2, 4), dispatch="all_to_all", wire_dtype=wire_dtype, rngs=nnx.Rngs(0)
        )
        gradients.append(jax.jit(jax.grad(lambda x_TD, layer=layer: layer(x_TD)[0].sum()))(x_TD))
    np.testing.assert_allclose(*gradients, atol=1e-6)


def test_other_formats_are_refused():
    config = jaxmoe.MoEConfig(num_experts=4, num_experts_per_tok=1, hidden_size=8, moe_intermediate_size=8)
    with pytest.raises(ValueError, match=r"as float8_e4m3fn, or in the activations' own .* got wire_dtype='int8'"):
        jaxmoe.MoE(config, mesh=mesh_of(1, 1, 8), wire_dtype="int8")
