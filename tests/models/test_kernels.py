"""The kernels of a model: the work that they are tried with is the work that they get, and what is taken is told."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxmoe
from jaxmoe.config import MoEConfig
from jaxmoe.kernels.grouped_matmul import Work, api, choose_backend, verdicts
from jaxmoe.kernels.grouped_matmul.work import MatrixKind, Outcome
from jaxmoe.layers import kernel_work
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import CASES, write_pair

CONFIG = MoEConfig(num_experts=11, num_experts_per_tok=3, hidden_size=16, moe_intermediate_size=8, bias=True)


def test_the_layer_takes_what_was_found_right(monkeypatch):
    """On the CPU, where nothing is tried, as if something had been."""
    layer = jaxmoe.MoE(CONFIG, mesh=mesh_of(2, 2, 2), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 16))
    expected, _ = layer(x)
    kinds = MatrixKind((2, 4, 16), "float32"), MatrixKind((16, 4), "float32")
    work = Work("float32", kinds, biases=True, activation="silu")
    assert kernel_work(layer, jnp.float32) == {"": work}
    asked = []
    found = {jax.devices()[0].device_kind: {("xla_ragged_dot", work): Outcome("right", "as told")}}
    monkeypatch.setattr(verdicts, "_known", found)
    load_backend = api.load_backend

    def load(name, *rest, **more):
        asked.append(name)
        return load_backend(name, *rest, **more)

    monkeypatch.setattr(api, "load_backend", load)
    y, _ = layer(x)
    assert set(asked) == {"xla_ragged_dot"}
    np.testing.assert_allclose(y, expected, atol=1e-6)


def test_the_work_of_packed_matrices_is_what_they_are_asked_for(tmp_path, monkeypatch):
    family, form, block = next(case for case in CASES if case[:2] == ("qwen3_moe", "fp8_block"))
    quantized, _, _ = write_pair(tmp_path, family, form, block)
    model = jaxmoe.load(quantized, mesh=mesh_of(1, 2, 4), dtype="float32")
    asked = set()

    def choose(work, *rest, **more):
        asked.add(work)
        return choose_backend(work, *rest, **more)

    monkeypatch.setattr(api, "choose_backend", choose)
    monkeypatch.setattr("jaxmoe.layers.moe.choose_backend", choose)
    jax.eval_shape(model, jnp.ones((1, 4), jnp.int32))
    work = kernel_work(model, model.dtype)
    assert any(path.endswith(".moe") for path in work)
    assert any(path.endswith(".attention.w_o") for path in work)
    assert asked == set(work.values())
    lines = [line for line in model.describe().splitlines() if line.startswith("kernels: ")]
    assert lines == [
        "kernels: portable for experts and packed dense layers (it runs everywhere, and no other was tried here)"
    ]


def test_a_kernel_that_was_named_is_told_and_not_tried(monkeypatch):
    monkeypatch.setattr("jaxmoe.models.kernels.hold_trials", None)
    model = jaxmoe.load(GOLDENS / "qwen3_moe" / "original", mesh=mesh_of(1, 1, 1), kernels="portable")
    assert "kernels: portable, as it was asked for" in model.describe().splitlines()
    assert jaxmoe.move(model, mesh=mesh_of(1, 1, 2)).kernels == "portable"
