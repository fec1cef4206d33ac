"""Every part under the settings that careful programs choose: no implicit promotion of dtypes or ranks, 64-bit numbers.

What they refuse is refused while a program is traced, so nothing is compiled here and no weight is made.
"""

import dataclasses
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxmoe
from jaxmoe.config import SCORES, MLPConfig, MoEConfig, RouterConfig
from jaxmoe.dispatch import DISPATCHES
from jaxmoe.generation import SamplingParams, sampling
from jaxmoe.kernels.grouped_matmul import ACTIVATIONS, BACKENDS, QuantizedStack, expert_mlp, grouped_matmul
from jaxmoe.kernels.grouped_matmul.quantized import FORMATS
from jaxmoe.models import Decoder, read_model_config
from jaxmoe.placement.replicas import REPLICA_CHOICES
from tests.support.covering import pairs
from tests.support.families import EVERY_KIND
from tests.support.meshes import mesh_of

pytestmark = pytest.mark.covering(most=3)

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = sorted(
    {path.relative_to(ROOT / "tests/goldens").parts[0] for path in ROOT.glob("tests/goldens/**/config.json")}
)
PLAIN = MoEConfig(num_experts=6, num_experts_per_tok=2, hidden_size=16, moe_intermediate_size=8)
ROUTERS = [
    *(RouterConfig(score=score) for score in SCORES),
    RouterConfig(score_after_top_k=True),
    RouterConfig(p_norm=2.0, scale=2.0),
    RouterConfig(logit_bias=True, correction_bias=True, num_groups=3, topk_groups=2),
    RouterConfig(num_groups=3, topk_groups=2, group_score="max", zero_other_groups=True),
    RouterConfig(expert_scale=True, input_norm_eps=1e-6),
    RouterConfig(sparsemixer=0.1),
]
LAYERS = [
    *(dataclasses.replace(PLAIN, router=router) for router in ROUTERS),
    *(dataclasses.replace(PLAIN, activation=name) for name in ACTIVATIONS),
    dataclasses.replace(PLAIN, activation="clamped_swiglu", activation_limit=1.0),
    dataclasses.replace(PLAIN, bias=True, weights_on_input=True),
    dataclasses.replace(PLAIN, gated=False),
    dataclasses.replace(
        PLAIN,
        shared=MLPConfig(hidden_size=16, intermediate_size=8, bias=True),
        shared_gate=True,
        latent_size=8,
        latent_bias=True,
    ),
]
# ragged_all_to_all differs from all_to_all in its collective alone, which has no CPU implementation.
HERE = sorted(DISPATCHES.keys() - {"ragged_all_to_all"})


@pytest.fixture
def careful():
    """All of the settings at once: what one of them refuses, they refuse together."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"), jax.enable_x64(True):
        yield


def traced(function, *args) -> None:
    """Trace it, and see that nothing became float64 that is not asked for."""
    text = str(jax.make_jaxpr(function)(*args))
    assert not re.search(r"f64\[\d", text), re.findall(r".*f64\[\d.*", text)[:3]


@cache
def abstract(family: str, dtype: str):
    config = next(path.parent for path in sorted((ROOT / "tests" / "goldens" / family).rglob("config.json")))
    return nnx.split(Decoder(read_model_config(config)[1], mesh=mesh_of(1, 2, 2), dtype=dtype))


def int32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("family", GOLDENS)
def test_every_family(family, careful):
    # What promotes bfloat16 without being asked is refused; numbers of 64 bits are seen in either.
    for dtype in ("bfloat16", *(["float32"] if family in EVERY_KIND else [])):
        graphdef, state = abstract(family, dtype)

        def generation(state, tokens_BS, lengths_B, graphdef=graphdef):
            model = nnx.merge(graphdef, state)
            logits_BV, cache, _ = model.prefill_and_stats(tokens_BS, lengths_B, model.init_cache(4, 32))
            return model.decode_and_stats(tokens_BS[:, 0], lengths_B, cache, lengths_B > 0)[:2], logits_BV

        traced(generation, state, int32(4, 16), int32(4))


def trace_layer(config, *, tokens=10, dtype=jnp.float32, choice=None, **options):
    """The layer with its gradient."""
    placement = jaxmoe.ExpertPlacement(6, 4, np.array([*range(6), 0, 0])) if choice else "linear"
    layer = jaxmoe.MoE(config, mesh=mesh_of(1, 2, 4), placement=placement, dtype=dtype, **options)
    if choice:
        layer.choose_replicas(choice, last_load=np.arange(4) if choice == "least_loaded" else None)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def loss(params, x_TD, mask_T):
        y_TD, stats = nnx.merge(graphdef, params, rest)(x_TD, mask_T)
        assert y_TD.dtype == dtype
        return jnp.sum(y_TD.astype(jnp.float32)) + stats.load_balancing_loss + stats.router_z_loss

    x_TD = jax.ShapeDtypeStruct((tokens, 16), dtype)
    traced(jax.grad(loss), params, x_TD, jax.ShapeDtypeStruct((tokens,), bool))


@pytest.mark.parametrize("config", LAYERS, ids=lambda config: f"layer{LAYERS.index(config)}")
def test_every_kind_of_layer(config, careful):
    trace_layer(config)


# Few rows and many: one round and several.
@pytest.mark.covering(most=4)
@pytest.mark.parametrize(
    ("dispatch", "kernels", "tokens", "dtype"), pairs(HERE, [*BACKENDS], [4, 2000], ["float32", "bfloat16"])
)
def test_every_dispatch_and_kernel(dispatch, kernels, tokens, dtype, careful):
    config = dataclasses.replace(PLAIN, bias=True, weights_on_input=tokens == 4)
    wire = "float8_e4m3fn" if tokens == 4 else None
    trace_layer(config, tokens=tokens, dtype=jnp.dtype(dtype), dispatch=dispatch, kernels=kernels, wire_dtype=wire)


@pytest.mark.parametrize("choice", REPLICA_CHOICES)
def test_every_choice_of_replicas(choice, careful):
    trace_layer(PLAIN, tokens=100, choice=choice, dispatch="all_gather")


@pytest.mark.parametrize(
    ("format", "scales"),
    [
        ("float8_e4m3fn", jnp.float32),
        ("int4", jnp.bfloat16),
        ("int8", jnp.bfloat16),
        ("mxfp4", jnp.uint8),
        ("nvfp4", jnp.float8_e4m3fn),
    ],
)
def test_packed_matrices(format, scales, careful):
    form = FORMATS[format]
    values = jax.ShapeDtypeStruct((2, 64, 64 // form.per_byte), form.dtype)
    scales = jax.ShapeDtypeStruct((2, 64, 2), scales)
    matrix_scales = jax.ShapeDtypeStruct((2,), jnp.float32)
    for backend in ("portable", "reference"):
        for rows in (3, 64):

            def product(x_RK, values, scales, matrix_scales, sizes_G, backend=backend):
                arrays = {"values": values, "scales": scales, "matrix_scales": matrix_scales}
                stack = QuantizedStack(**arrays, format=format, block=(1, 32))
                plain, rounded = (
                    grouped_matmul(x_RK, stack, sizes_G, backend=backend, activations=activations)
                    for activations in ("none", "int8_token")
                )
                return plain, rounded

            traced(product, jax.ShapeDtypeStruct((rows, 64), jnp.bfloat16), values, scales, matrix_scales, int32(2))


@pytest.mark.parametrize(
    "mode", [sampling.Mode(), sampling.Mode(greedy=False, truncates=True, penalizes=True)], ids=str
)
def test_sampling(mode, careful):
    controls = sampling.Controls.of(SamplingParams(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1))

    def choose(logits_BV, seeds_B2, step, seen_BV):
        return sampling.choose(logits_BV, seeds_B2, step, seen_BV, controls, mode)

    logits = jax.ShapeDtypeStruct((4, 50), jnp.float32)
    seeds = jax.ShapeDtypeStruct((4, 2), jnp.uint32)
    traced(choose, logits, seeds, int32(), jax.ShapeDtypeStruct((4, 50), bool))


@pytest.mark.full
@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("dispatch", HERE)
def test_a_layer_of_float64_computes_in_float64(dispatch, kernels):
    """A derivative by differences agrees with the gradient to ten digits, which no step in float32 leaves."""
    config = dataclasses.replace(
        PLAIN, shared=MLPConfig(hidden_size=16, intermediate_size=8), shared_gate=True, latent_size=8, bias=True
    )
    with jax.enable_x64(True):
        layer = jaxmoe.MoE(
            config, mesh=mesh_of(1, 2, 4), dispatch=dispatch, kernels=kernels, dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
        x_TD, dx_TD = np.random.default_rng(0).normal(size=(2, 12, 16))

        @jax.jit
        def loss(params, x_TD):
            y_TD, stats = nnx.merge(graphdef, params, rest)(x_TD)
            assert y_TD.dtype == stats.load_balancing_loss.dtype == stats.router_z_loss.dtype == jnp.float64
            return jnp.sum(y_TD**2) + stats.load_balancing_loss + stats.router_z_loss

        dparams = jax.tree.map(jnp.cos, params)
        gradients, gradient_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x_TD)
        slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(dparams), strict=True))
        slope += jnp.vdot(gradient_x, dx_TD)
        h = 1e-5

        def moved(by):
            return loss(jax.tree.map(lambda p, d: p + by * d, params, dparams), x_TD + by * dx_TD)

        np.testing.assert_allclose((moved(h) - moved(-h)) / (2 * h), slope, rtol=1e-8)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="newer ones warn of Pallas Triton where it is lowered")
def test_the_triton_kernel(careful):
    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16)

    def mlp(x, up, down, b_up, b_down, sizes):
        options = {"b_gate_up_p2F": b_up, "b_down_pD": b_down, "backend": "triton"}
        return jnp.sum(expert_mlp(x, up, down, sizes, **options).astype(jnp.float32))

    args = (shape(30, 64), shape(2, 2, 64, 64), shape(2, 64, 64), shape(2, 2, 64), shape(2, 64), int32(2))
    traced(jax.grad(mlp, argnums=(0, 1, 2, 3, 4)), *args)


PROGRAM = """
import jaxmoe
jaxmoe.simulate_devices(4)
model = jaxmoe.load("demo", mesh=jaxmoe.make_mesh(tp=2, ep=2))
def outputs():
    greedy = jaxmoe.generate(model, [[5, 6, 7], [8]], max_new_tokens=4, ignore_eos=True)
    drawn = jaxmoe.generate(model, [[5, 6, 7]], max_new_tokens=4, temperature=0.8, top_k=20, top_p=0.9,
                            repetition_penalty=1.1, seed=3, ignore_eos=True)
    return [out.token_ids for out in (*greedy, *drawn)]
before = outputs()
assert model([[5, 6, 7]]).dtype == "float32"
assert model.rebalance("round_robin").total > 0
after = outputs()
assert before == after, (before, after)
print(after)
"""


@pytest.mark.full
def test_generation_is_the_same_with_all_of_it():
    """The demo model generates and is rebalanced, in a process of its own, and the tokens are those of any other."""

    def run(**settings):
        # What makes compilation fast, without the devices.
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=os.environ | {"XLA_FLAGS": " ".join(flags)} | settings,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise", "JAX_ENABLE_X64": "1"}
    assert run(**strict) == run()
