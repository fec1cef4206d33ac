"""Kimi K3, the text part, against a plain NumPy model that was written from the published description."""

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxmoe
from jaxmoe.checkpoint import CheckpointError, open_checkpoint
from jaxmoe.checkpoint.inspection.summary import summarize
from jaxmoe.checkpoint.mapping import count_parameters
from jaxmoe.config import BlockResidualsConfig, DecoderConfig, MoEConfig
from jaxmoe.layers import ParamFactory, append_stream, join_streams, params_by_path
from jaxmoe.layers.block_residuals import BlockResiduals, BlockResidualsHead
from jaxmoe.models import get_family, read_model_config
from tests.support import kimi_k3
from tests.support.goldens import GOLDENS, LOGIT_TOLERANCE, check_alone, check_greedy, check_logits, read_expected
from tests.support.kimi_k3 import CONFIG, SMALL, NumpyKimiK3, make_tensors
from tests.support.meshes import mesh_id, mesh_of
from tests.support.published import KIMI_K3

ORIGINAL = GOLDENS / "kimi_k3" / "original"


def read(**changes: Any) -> DecoderConfig:
    return get_family("kimi_linear").read_config({**SMALL, **changes})


@pytest.mark.covering(most=1)
@pytest.mark.parametrize(
    ("mesh_shape", "placement"),
    [((1, 1, 1), "linear"), ((2, 2, 2), "round_robin"), ((1, 2, 4), "linear"), ((1, 8, 1), "linear")],
    ids=mesh_id,
)
def test_logits_and_greedy_tokens(mesh_shape, placement):
    expected = read_expected("kimi_k3")
    model = jaxmoe.load(ORIGINAL, mesh=mesh_of(*mesh_shape), placement=placement, check_finite=True)
    report = model.load_report
    assert report.bytes_read == report.bytes_needed
    assert report.ignored == {"vision part": ("mm_projector.weight", "vision_tower.weight")}
    check_logits(model, expected)
    if mesh_shape == (1, 2, 4):
        check_greedy(model, expected)


@pytest.mark.full
def test_a_prompt_alone():
    check_alone(jaxmoe.load(ORIGINAL, mesh=mesh_of(2, 2, 2), placement="round_robin"), read_expected("kimi_k3"))


def test_stored_results_are_those_of_the_numpy_model():
    expected = read_expected("kimi_k3")
    tensors = make_tensors(SMALL, seed=0)
    stored = load_file(ORIGINAL / "model.safetensors")
    assert json.loads((ORIGINAL / "config.json").read_text()) == CONFIG
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(stored[f"language_model.{name}"], tensor, err_msg=name)
    logits = NumpyKimiK3(SMALL, tensors).logits(expected["prompt"][1].tolist())
    np.testing.assert_allclose(logits, expected["logits"][1], rtol=1e-5, atol=1e-5)


def test_every_setting_matters_in_the_stored_results():
    """What is wrong in one of them is seen in the logits."""
    expected = read_expected("kimi_k3")
    prompt, logits = expected["prompt"][2].tolist(), expected["logits"][2]
    inner = SMALL["linear_attn_config"]
    for changes in (
        {"activation_situ_beta": 0.9},
        {"activation_situ_linear_beta": 30.0},
        {"attn_res_block_size": 3},
        {"linear_attn_config": {**inner, "gate_lower_bound": -4.0}},
    ):
        other = NumpyKimiK3({**SMALL, **changes}, make_tensors(SMALL, seed=0)).logits(prompt)
        assert np.abs(other - logits).max() > 10 * LOGIT_TOLERANCE * np.abs(logits).max(), changes


def test_the_text_part_alone_is_written_and_read_again(tmp_path):
    model = jaxmoe.load(ORIGINAL, mesh=mesh_of(1, 2, 4))
    for way in ("save", "convert"):
        out = tmp_path / way
        if way == "save":
            jaxmoe.save(model, out)
        else:
            jaxmoe.convert(ORIGINAL, out)
        config = json.loads((out / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == ("kimi_linear", ["KimiLinearForCausalLM"])
        written = open_checkpoint(out).tensors
        # The entries of A_log that belong to no head are there again.
        assert {name: tensor.shape for name, tensor in written.items()} == kimi_k3.shapes(SMALL)
        theirs = params_by_path(jaxmoe.load(out, mesh=mesh_of(1, 2, 4)))
        for path, param in params_by_path(model).items():
            np.testing.assert_array_equal(param[...], theirs[path][...], err_msg=path)


def test_rates_of_another_number_are_refused(tmp_path):
    """The released tensor is as long as a head is wide; one that is not is no tensor of this model."""
    tensors = load_file(ORIGINAL / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.A_log"
    save_file({**tensors, name: tensors[name][:8]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.A_log.*\(8,\)"):
        jaxmoe.load(tmp_path, mesh=mesh_of(1, 1, 1))


def decoded(packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Numbers of 4 bits, the first of a byte in its low half, times 2^(scale - 127) for each 32 of them."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    signed = np.where(codes > 7, -1, 1) * table[codes & 7]
    return (signed * np.repeat(2.0 ** (scales.astype(int) - 127), 32, axis=1)).astype(np.float32)


@pytest.mark.full
def test_experts_are_packed_as_the_publisher_has_them(tmp_path):
    text = {
        **SMALL,
        "num_hidden_layers": 2,
        "linear_attn_config": {**SMALL["linear_attn_config"], "kda_layers": [1], "full_attn_layers": [2]},
        "routed_expert_hidden_size": 32,
        "moe_intermediate_size": 32,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "config_groups": {
                "group_0": {
                    "format": "mxfp4-pack-quantized",
                    "targets": ["Linear"],
                    "weights": {
                        "num_bits": 4,
                        "type": "float",
                        "strategy": "group",
                        "group_size": 32,
                        "symmetric": True,
                    },
                }
            },
            "ignore": [
                "re:.*self_attn.*",
                "re:.*shared_experts.*",
                "re:.*mlp\\.(gate|up|down)_proj.*",
                "re:.*lm_head.*",
            ],
        },
    }
    tensors, stored, rng = make_tensors(text, seed=3), {}, np.random.default_rng(4)
    for name, tensor in tensors.items():
        if ".experts." not in name:
            stored[f"language_model.{name}"] = tensor
            continue
        packed = rng.integers(0, 256, (len(tensor), tensor.shape[1] // 2), np.uint8)
        scales = rng.integers(124, 127, (len(tensor), tensor.shape[1] // 32)).astype(np.uint8)
        tensors[name] = decoded(packed, scales)
        base = f"language_model.{name.removesuffix('.weight')}"
        stored |= {f"{base}.weight_packed": packed, f"{base}.weight_scale": scales}
    save_file(stored, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "text_config": text}))
    summary = summarize(tmp_path)
    assert (summary.problems, summary.uncovered) == ((), [])
    prompt = rng.integers(3, text["vocab_size"], 9).tolist()
    expected = NumpyKimiK3(text, tensors).logits(prompt)
    for quantized in ("keep", "dequantize"):
        model = jaxmoe.load(tmp_path, mesh=mesh_of(1, 1, 4), quantized=quantized)
        found = np.asarray(model(np.array([prompt])))[0]
        assert np.abs(found - expected).max() < LOGIT_TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_situ_linear_beta": 20.0}, "activation_situ_linear_beta=25.0; config.json gives 0.8 and 20.0"),
        ({"activation_situ_beta": None}, "beside an activation_situ_beta"),
        ({"attn_res_block_size": 0}, "attn_res_block_size"),
        ({"routed_expert_hidden_size": None}, "latent_moe_use_norm is of experts that work on a latent"),
        ({"mla_use_nope": False}, "known with mla_use_nope=True alone"),
        (
            {"linear_attn_config": {**SMALL["linear_attn_config"], "use_full_rank_gate": False}},
            "use_full_rank_gate=False and gate_lower_bound=-5.0",
        ),
        (
            {"linear_attn_config": {**SMALL["linear_attn_config"], "gate_lower_bound": None}},
            "use_full_rank_gate=True and gate_lower_bound=None",
        ),
    ],
)
def test_what_is_not_known_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        read(**changes)


def test_settings_go_where_they_belong():
    config = read()
    assert [layer.starts_block for layer in config.layers] == [True, False, True, False, True]
    assert config.streams == BlockResidualsConfig()
    dense, sparse = config.layers[0].feed_forward, config.layers[1].feed_forward
    assert isinstance(sparse, MoEConfig)
    assert (sparse.latent_size, sparse.latent_norm_eps, sparse.activation) == (18, 1e-5, "situ")
    for ffn in (dense, sparse, sparse.shared):
        assert ffn is not None
        assert (ffn.activation, ffn.activation_limit) == ("situ", 0.8)
    assert config.layers[2].attention.output_gate
    kda = config.layers[0].attention
    assert (kda.gate_rank, kda.decay_rank, kda.least_log_decay, kda.spare_rates) == (None, 11, -5.0, 3)
    assert kda.activation == "silu"
    released = get_family("kimi_linear").read_config(KIMI_K3["text_config"])
    assert [i for i, layer in enumerate(released.layers) if layer.starts_block] == [*range(0, 93, 12)]
    assert released.layers[0].attention.spare_rates == 32
    with pytest.raises(ValueError, match="starts a block of layers where blocks have residual streams"):
        dataclasses.replace(config, streams=None)


def test_wrapper_of_the_config_alone():
    family, config = read_model_config(ORIGINAL)
    assert family.wrapper is not None
    assert family.wrapper.model_type == "kimi_k3"
    assert config == read()


@pytest.mark.full
def test_the_released_model_has_its_published_size(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(KIMI_K3))
    _, config = read_model_config(tmp_path)
    parameters, active = count_parameters(config)
    assert parameters == sum(math.prod(shape) for shape in kimi_k3.shapes(KIMI_K3["text_config"]).values())
    # 2.8T in all, and 104B for each token without the embedding, as its card says.
    embedding = config.vocab_size * config.hidden_size
    assert [round(parameters / 1e11), round((active - embedding) / 1e9)] == [28, 104]
    assert jaxmoe.plan(tmp_path, ep=8, device="h200").parameters == parameters


@pytest.mark.parametrize("kind", [BlockResiduals, BlockResidualsHead])
def test_streams_are_read_by_attention_and_the_last_is_written_to(kind):
    module = kind(BlockResidualsConfig(), 5, 1e-3, param=ParamFactory(mesh_of(1, 1, 1), jnp.float32, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    norm, w = rng.normal(size=5), rng.normal(size=(1, 5))
    module.norm.set_value(jnp.float32(norm))
    module.w.set_value(jnp.float32(w))
    x, y = rng.normal(size=(2, 4, 3, 5)), rng.normal(size=(2, 4, 5))
    scores = np.exp((x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * norm) @ w[0])
    expected = ((scores / scores.sum(-1, keepdims=True))[..., None] * x).sum(2)
    if kind is BlockResidualsHead:
        np.testing.assert_allclose(module(jnp.float32(x)), expected, rtol=1e-4, atol=1e-5)
        return
    found, weights = module(jnp.float32(x))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    joined = x.copy()
    joined[:, :, -1] += y
    np.testing.assert_allclose(join_streams(jnp.float32(x), weights, jnp.float32(y)), joined, rtol=1e-5, atol=1e-6)
    more = np.concatenate([x, y[:, :, None]], axis=2)
    np.testing.assert_array_equal(append_stream(jnp.float32(x), jnp.float32(y)), np.float32(more))
