"""Multimodal checkpoints: their text part loads, is inspected, converted and adapted as the family it is."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmoe
from jaxmoe.checkpoint import CheckpointError, open_checkpoint
from jaxmoe.checkpoint.inspection.summary import summarize
from jaxmoe.generation.eos import eos_token_ids
from jaxmoe.layers import params_by_path
from jaxmoe.models import FAMILIES, WRAPPERS, find_family, read_model_config
from tests.support import runs
from tests.support.adapters import factors, write_adapter
from tests.support.families import WRAPPERS as SIZES
from tests.support.goldens import GOLDENS, check_greedy, check_logits, read_expected
from tests.support.meshes import mesh_id, mesh_of

pytestmark = pytest.mark.covering(most=3)

LLAMA4 = GOLDENS / "llama4" / "original"


def copy_of(source: Path, directory: Path, **changes) -> Path:
    """A copy of a checkpoint with other entries in its config.json; None takes one out."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


# The text part alone is tested on more meshes. Where transformers is at hand, tests/parity compares on (2, 2, 2) with it.
@pytest.mark.covering(most=1)
@pytest.mark.parametrize("mesh_shape", [(1, 2, 4), *([] if runs.live else [(2, 2, 2)])], ids=mesh_id)
@pytest.mark.parametrize("name", SIZES)
def test_logits_and_greedy_tokens(name, mesh_shape):
    expected = read_expected(name)
    model = jaxmoe.load(GOLDENS / name / "original", mesh=mesh_of(*mesh_shape), placement="round_robin")
    check_logits(model, expected)
    if runs.full and mesh_shape == (1, 2, 4):
        check_greedy(model, expected)


@pytest.mark.parametrize("name", SIZES)
def test_what_is_not_text_is_ignored_by_name(name):
    directory = GOLDENS / name / "original"
    report = jaxmoe.load(directory, mesh=mesh_of(1, 1, 1)).load_report
    wrapper = WRAPPERS[name]
    ignored = {tensor for names in report.ignored.values() for tensor in names}
    # Released Step-3.7 has no prefix before the names of its text part.
    own = ("lm_head.", "model.embed_tokens.", "model.layers.", "model.norm.")
    beside = {
        tensor
        for tensor in open_checkpoint(directory).tensors
        if wrapper.text_name(tensor) == tensor and not tensor.startswith(own)
    }
    assert report.ignored.keys() <= wrapper.ignored.keys()
    assert ignored
    # Routed experts of another part may stand in the layers of the text part.
    assert {tensor for tensor in ignored if not tensor.startswith("model.layers.")} == beside
    assert report.bytes_read == report.bytes_needed
    summary = summarize(directory)
    assert (summary.model_type, summary.known, summary.problems, summary.uncovered) == (name, True, (), [])
    assert {rule: set(names) for rule, names in summary.ignored.items()} == {
        rule: set(names) for rule, names in report.ignored.items()
    }
    assert summary.groups["ignored by rule"]["tensors"] == len(ignored)
    assert summary.moe_layers == len(read_model_config(directory)[1].moe_layers)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("way", ["convert", "save"])
def test_converting_writes_the_text_model_alone(name, way, tmp_path):
    source = copy_of(GOLDENS / name / "original", tmp_path / "source")
    for file in ("processor_config.json", "tokenizer_config.json"):
        (source / file).write_text("{}")
    model = jaxmoe.load(source, mesh=mesh_of(2, 2, 2))
    out = tmp_path / "out"
    report = jaxmoe.convert(source, out) if way == "convert" else jaxmoe.save(model, out)
    assert report.carried == 0
    assert all(tensor.startswith(("model.", "lm_head.")) for tensor in open_checkpoint(out).tensors)
    assert {file.name for file in out.glob("*.json")} == {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == WRAPPERS[name].text
    assert config["architectures"] == [WRAPPERS[name].architecture]
    assert not {"text_config", "vision_config"} & config.keys()
    plain = jaxmoe.load(out, mesh=mesh_of(2, 2, 2))
    assert plain.load_report.ignored == {}
    assert plain.config == model.config
    theirs = params_by_path(plain)
    for path, param in params_by_path(model).items():
        np.testing.assert_array_equal(param[...], theirs[path][...], err_msg=path)


@pytest.mark.parametrize("prefix", ["language_model.", ""], ids=["of the whole", "of the text part"])
def test_adapters_of_either_model_are_merged(prefix, tmp_path):
    module = "model.layers.1.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "adapter", factors(f"{prefix}{module}", 64, 32), target_modules=["q_proj"])
    model = jaxmoe.load(LLAMA4, mesh=mesh_of(1, 1, 1), adapter=adapter)
    name = f"base_model.model.{prefix}{module}"
    tensors = factors(f"{prefix}{module}", 64, 32)
    expected = load_file(LLAMA4 / "model.safetensors")[f"language_model.{module}.weight"] + 1.5 * (
        tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
    )
    np.testing.assert_allclose(params_by_path(model)["layers.1.attention.w_q"][...], expected, atol=1e-5)
    assert model.load_report.adapter.merged == {"model.layers.*.self_attn.q_proj.weight": 1}


def test_adapters_of_the_vision_part_are_refused(tmp_path):
    module = "vision_model.model.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "adapter", factors(module, 16, 16), target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"vision_model.*is not, by the rule 'vision part'"):
        jaxmoe.load(LLAMA4, mesh=mesh_of(1, 1, 1), adapter=adapter)


def test_experts_are_read_in_either_orientation(tmp_path):
    """Qwen3-VL's files have (in, out) as released, and (out, in) where transformers 5 saved them."""
    source = GOLDENS / "qwen3_vl_moe" / "original"
    directory = copy_of(source, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    turned = {
        name: np.ascontiguousarray(value.swapaxes(1, 2)) if ".experts." in name else value
        for name, value in tensors.items()
    }
    save_file(turned, directory / "model.safetensors")
    mesh = mesh_of(2, 2, 2)
    expected = params_by_path(jaxmoe.load(source, mesh=mesh))
    for path, param in params_by_path(jaxmoe.load(directory, mesh=mesh)).items():
        np.testing.assert_array_equal(param[...], expected[path][...], err_msg=path)
    assert summarize(directory).problems == ()
    assert summarize(directory).layouts == {"fused_transposed": [0]}
    half = turned | {name: value for name, value in tensors.items() if name.endswith("experts.down_proj")}
    save_file(half, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"gate_up_proj' has shape .*last two dims are swapped"):
        jaxmoe.load(directory, mesh=mesh)


@pytest.mark.parametrize("form", ["original", "fused"])
def test_routed_experts_of_images_are_ignored_by_their_number(form):
    """ERNIE-4.5-VL as released has the experts of both parts in one list, and both biases in one tensor."""
    ignored = jaxmoe.load(GOLDENS / "ernie4_5_vl_moe" / form, mesh=mesh_of(1, 1, 1)).load_report.ignored
    layers = ("model.layers.1.mlp", "model.layers.2.mlp")
    if form == "fused":
        parts = ("experts.down_proj", "experts.gate_up_proj", "gate.moe_statics.e_score_correction_bias", "gate.weight")
        assert set(ignored["vision experts"]) == {f"{layer}.vision_moe.{part}" for layer in layers for part in parts}
        return
    experts = {
        f"{layer}.experts.{expert}.{part}_proj.weight"
        for layer in layers
        for expert in range(5, 10)
        for part in ("gate", "up", "down")
    }
    assert set(ignored["vision experts"]) == experts | {f"{layer}.gate.weight_1" for layer in layers}
    assert set(ignored["vision row"]) == {f"{layer}.moe_statics.e_score_correction_bias[rest]" for layer in layers}


def test_experts_beyond_those_of_both_parts_are_refused(tmp_path):
    directory = copy_of(GOLDENS / "ernie4_5_vl_moe" / "original", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    extra = "model.layers.1.mlp.experts.10.up_proj.weight"
    save_file(tensors | {extra: np.ones((12, 32), np.float32)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.10\.up_proj\.weight.*no rule ignores it"):
        jaxmoe.load(directory, mesh=mesh_of(1, 1, 1))


def test_what_no_rule_names_is_refused(tmp_path):
    directory = copy_of(LLAMA4, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"speech.weight": np.ones(3, np.float32)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"speech\.weight.*no rule ignores it"):
        jaxmoe.load(directory, mesh=mesh_of(1, 1, 1))
    assert summarize(directory).uncovered == ["speech.weight"]
    save_file(tensors | {"model.norm.weight": np.ones(32, np.float32)}, directory / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is there twice"):
        jaxmoe.load(directory, mesh=mesh_of(1, 1, 1))


def test_every_wrapper_is_around_a_family_that_is_there():
    assert {wrapper.text for wrapper in WRAPPERS.values()} <= FAMILIES.keys()


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("gemma4", "model.language_model.layers.1.router.scale", "model.layers.1.router.scale"),
        ("ernie4_5_vl_moe", "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("ernie4_5_vl_moe", "model.language_model.layers.1.mlp.text_moe.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("ernie4_5_moe_vl", "vision_model.ln.weight", "vision_model.ln.weight"),
        ("gemma4", "model.vision_tower.encoder.layers.0.x", "model.vision_tower.encoder.layers.0.x"),
        ("kimi_k25", "language_model.model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("kimi_k25", "language_model.model.blocks.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("kimi_k25", "model.language_model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("kimi_k25", "language_model.lm_head.weight", "lm_head.weight"),
        ("kimi_k25", "vision_tower.encoder.blocks.0.wo.weight", "vision_tower.encoder.blocks.0.wo.weight"),
        ("qwen3_5_moe", "lm_head.weight", "lm_head.weight"),
        ("qwen3_omni_moe", "thinker.model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.weight"),
        ("qwen3_omni_moe", "thinker.model.language_model.norm.weight", "model.norm.weight"),
        ("qwen3_omni_moe", "thinker.lm_head.weight", "lm_head.weight"),
        ("qwen3_omni_moe", "talker.model.norm.weight", "talker.model.norm.weight"),
        ("qwen3_omni_moe_thinker", "model.language_model.norm.weight", "model.norm.weight"),
        ("qwen3_omni_moe_thinker", "model.norm.weight", "model.norm.weight"),
    ],
)
def test_names_of_the_text_part(name, tensor, expected):
    assert WRAPPERS[name].text_name(tensor) == expected


@pytest.mark.parametrize(("name", "tied"), [("llama4", False), ("gemma4", True)])
def test_each_setting_is_taken_from_its_level(name, tied):
    """The output projection of Llama 4 belongs to the text model inside, that of Gemma 4 to the model around it."""
    text = {"hidden_size": 8, "tie_word_embeddings": False, "eos_token_id": 5, "dtype": "float32", "bos_token_id": 3}
    outer = {"model_type": name, "tie_word_embeddings": True, "eos_token_id": [7], "dtype": "bfloat16"}
    family, config = find_family({**outer, "bos_token_id": None, "text_config": text})
    assert (family.wrapper, family.model_type) == (WRAPPERS[name], config["model_type"])
    assert config["tie_word_embeddings"] is tied
    assert (config["eos_token_id"], config["bos_token_id"], config["dtype"]) == ([7], 3, "bfloat16")
    assert config["hidden_size"] == 8


def test_the_thinkers_settings_are_found_a_level_deeper():
    text = {"hidden_size": 8, "eos_token_id": 5, "model_type": "qwen3_omni_moe_text"}
    whole = {"model_type": "qwen3_omni_moe", "thinker_config": {"tie_word_embeddings": True, "text_config": text}}
    family, config = find_family({**whole, "dtype": "bfloat16"})
    assert (family.model_type, config["model_type"]) == ("qwen3_moe", "qwen3_moe")
    assert (config["tie_word_embeddings"], config["dtype"], config["norm_topk_prob"]) == (True, "bfloat16", True)
    assert config["rope_theta"] == 1e6
    own = {"norm_topk_prob": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    _, config = find_family({**whole, "thinker_config": {"text_config": {**text, **own}}})
    assert config["norm_topk_prob"] is False
    assert "rope_theta" not in config
    with pytest.raises(
        ValueError, match=r"qwen3_omni_moe has a thinker_config\.text_config, with the sizes; it is None"
    ):
        find_family({"model_type": "qwen3_omni_moe", "text_config": text})


@pytest.mark.parametrize("name", ["talker.model.norm.weight", "code2wav.pre_transformer.norm.weight"])
def test_the_parts_that_speak_are_ignored_by_name(name, tmp_path):
    directory = copy_of(GOLDENS / "qwen3_omni_moe" / "original", tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {name: np.ones(3, np.float32)}, directory / "model.safetensors")
    assert jaxmoe.load(directory, mesh=mesh_of(1, 1, 1)).load_report.ignored["speech part"] == (name,)


def test_tokens_that_end_a_text_are_found_on_either_level(tmp_path):
    for config, expected in [
        ({"eos_token_id": None, "text_config": {"eos_token_id": 4}}, {4}),
        ({"eos_token_id": [6, 7], "text_config": {"eos_token_id": 4}}, {6, 7}),
        ({"thinker_config": {"text_config": {"eos_token_id": 9}}}, {9}),
        ({"text_config": None}, set()),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "config.json of llama4 has a text_config"),
        (
            {"text_config": {"model_type": "clever_text"}},
            "'clever_text' is not known; jaxmoe loads .* text part of .*llama4",
        ),
        ({"model_type": "llama5"}, "'llama5' is not known"),
    ],
    ids=["missing", "unknown text", "unknown"],
)
def test_a_wrapper_without_a_known_text_part_is_refused(changes, message, tmp_path):
    directory = copy_of(LLAMA4, tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        jaxmoe.load(directory, mesh=mesh_of(1, 1, 1))
    assert not summarize(directory).known
