"""Layers for multi-token prediction: loaded by the published names, computed as published, missed where they are not."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxmoe
from jaxmoe.checkpoint.inspection import summarize
from jaxmoe.checkpoint.mapping import count_parameters
from jaxmoe.models import FAMILIES, read_model_config
from tests.support.goldens import GOLDENS, LOGIT_TOLERANCE
from tests.support.meshes import mesh_id, mesh_of
from tests.support.mtp import LAYOUTS, prediction_logits, write_checkpoint

CONFIGS = GOLDENS.parent.parent / "docs" / "configs"


# The short run has a layer behind the model's own, one with names of its own, and one without experts.
SHORT = ("deepseek_v3", "qwen3_next", "mimo_v2_flash")
CASES = [
    pytest.param(family, shape, marks=() if family in SHORT and shape == (2, 2, 2) else pytest.mark.full)
    for family in LAYOUTS
    for shape in ((2, 2, 2), (1, 2, 4))
]


@pytest.mark.parametrize(("family", "shape"), CASES, ids=mesh_id)
def test_logits_are_those_of_the_published_equations(family, shape, tmp_path) -> None:
    """The stored logits are of transformers' decoder layer between the combining parts; see scripts/make_mtp_goldens.py."""
    path = write_checkpoint(family, tmp_path / family)
    model = jaxmoe.load(path, mesh=mesh_of(*shape), placement="round_robin", mtp=True)
    with np.load(GOLDENS / "mtp" / f"{family}.npz") as stored:
        expected = [stored[f"logits_{depth}"] for depth in range(1, LAYOUTS[family].count + 1)]
        for logits, wanted in zip(prediction_logits(model, stored["prompt"], len(expected)), expected, strict=True):
            assert np.abs(logits - wanted).max() < LOGIT_TOLERANCE * np.abs(wanted).max()


def test_every_family_that_has_them_is_here() -> None:
    others = {"kimi_k2"}  # deepseek_v3 under another name
    assert {name for name, family in FAMILIES.items() if family.mtp is not None} == {*LAYOUTS, *others}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint("glm4_moe", tmp_path_factory.mktemp("mtp") / "glm4_moe")


def test_their_tensors_are_used_or_told(checkpoint) -> None:
    mesh = mesh_of(1, 1, 1)
    copies = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")
    own = {name for name in load_file(checkpoint / "model.safetensors") if name.startswith("model.layers.2.")}
    without, model = (jaxmoe.load(checkpoint, mesh=mesh, mtp=mtp) for mtp in (False, True))
    assert set(without.load_report.ignored["multi-token prediction"]) == own
    assert model.load_report.ignored == {"embedding and output projection again": copies}
    assert (len(without.moe_layers), len(model.moe_layers), len(model.prediction_layers)) == (1, 2, 1)
    assert "3 layers, 2 of them with routed experts, the last 1 for multi-token prediction" in model.describe()
    # They are no part of what a token goes through.
    prompt = [[5, 6, 7, 8]]
    np.testing.assert_array_equal(np.asarray(model(prompt)), np.asarray(without(prompt)))


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_next", "mimo_v2_flash"])
def test_a_saved_model_has_them_again(family, tmp_path) -> None:
    path = write_checkpoint(family, tmp_path / "source")
    model = jaxmoe.load(path, mesh=mesh_of(2, 2, 2), placement="round_robin", mtp=True)
    jaxmoe.save(model, tmp_path / "saved")
    jaxmoe.convert(path, tmp_path / "converted")
    source = load_file(path / "model.safetensors")
    for made in ("saved", "converted"):
        written = load_file(tmp_path / made / "model.safetensors")
        assert written.keys() == source.keys()
        for name, value in source.items():
            np.testing.assert_array_equal(written[name], value)


def test_inspect_and_plan_count_their_bytes(checkpoint) -> None:
    new = {name: value for name, value in load_file(checkpoint / "model.safetensors").items() if ".layers.2." in name}
    size = sum(value.nbytes for name, value in new.items() if "embed_tokens" not in name and "head.head" not in name)
    less, more = (summarize(checkpoint, mtp=mtp) for mtp in (False, True))
    assert (more.parameters - less.parameters) * 4 == size
    assert (more.active_parameters, more.uncovered, more.problems) == (less.active_parameters, [], ())
    plans = [jaxmoe.plan(checkpoint, mtp=mtp, max_length=16) for mtp in (False, True)]
    cache = [plan.parts["key/value cache and state"][0] for plan in plans]
    assert plans[1].held_per_device[0] - cache[1] - (plans[0].held_per_device[0] - cache[0]) == size
    assert cache[1] / cache[0] == 3 / 2
    assert plans[0].active_parameters == plans[1].active_parameters


def test_deepseek_v3_has_the_published_number_of_parameters() -> None:
    """671B in the model and 14B in the layer for multi-token prediction, with its copies of both tables."""
    (_, main), (_, both) = (read_model_config(CONFIGS / "DeepSeek-V3", mtp=mtp) for mtp in (False, True))
    own, active = count_parameters(main)
    more = count_parameters(both)[0] - own
    assert (round(own / 1e9), round(active / 1e9)) == (671, 38)
    assert round((more + 2 * main.vocab_size * main.hidden_size) / 1e9, 1) == 13.5
    assert count_parameters(both)[1] == active


def refused(path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jaxmoe.load(path, mesh=mesh_of(1, 1, 1), mtp=True)


def test_a_checkpoint_without_them_is_told(checkpoint, tmp_path) -> None:
    refused(GOLDENS / "glm4_moe" / "original", r"has no tensor 'model.layers.2.eh_proj.weight' \(transformers leaves")
    refused(GOLDENS / "qwen3_next" / "original", "has no tensor 'mtp.fc.weight'")
    refused(GOLDENS / "mixtral" / "original", "knows of some families, and mixtral is none of them; load it without")
    shutil.copytree(checkpoint, tmp_path / "none")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "none" / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    refused(tmp_path / "none", r"config.json says that the model has none \(num_nextn_predict_layers is 0\)")
