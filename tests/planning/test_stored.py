"""Bytes of weights as a checkpoint's files hold them, by its settings alone."""

import json

import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint import open_checkpoint
from jaxmoe.checkpoint.mapping import abstract_specs
from jaxmoe.checkpoint.mapping.packed import choose_packings
from jaxmoe.cli import main
from jaxmoe.planning.planned import PlannedCheckpoint
from jaxmoe.planning.stored import stored_weights
from jaxmoe.quant import QuantizationError
from tests.support.goldens import GOLDENS
from tests.support.published import GPT_OSS_120B
from tests.support.quantized_checkpoints import write_pair

MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
TINY = json.loads((GOLDENS / "deepseek_v3" / "original" / "config.json").read_text())


def directory(path, config, **more):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**config, **more}))
    return path


def test_they_are_the_bytes_of_the_files(tmp_path) -> None:
    quantized, plain, _ = write_pair(tmp_path, "gpt_oss", "mxfp4", MXFP4)
    for path, formats in ((quantized, {"mxfp4", "plain"}), (plain, {"plain"})):
        stored = jaxmoe.plan(path).stored
        assert stored.nbytes == open_checkpoint(path).nbytes
        assert set(stored.formats["routed experts"]) == formats


def test_gpt_oss_120b_has_its_published_size(tmp_path, capsys) -> None:
    config = {**GPT_OSS_120B, "num_hidden_layers": 36, "torch_dtype": "bfloat16", "quantization_config": MXFP4}
    report = jaxmoe.plan(directory(tmp_path / "c", config), ep=8, device="h100")
    assert report.stored.nbytes == pytest.approx(65.25e9, rel=2e-3)  # of its files on the hub
    experts = sum(report.stored.formats["routed experts"].values())
    assert report.parts["routed experts"].sum() == experts
    assert report.held["routed experts"] == {"mxfp4, uint8 scales of 1 x 32": 72}
    assert report.fits
    assert not jaxmoe.plan(tmp_path / "c", ep=1, device="h100", quantized="dequantize").fits
    assert main(["plan", str(tmp_path / "c")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "65.2 GB of weights in the checkpoint, routed experts in mxfp4 (mxfp4); held packed: routed experts as mxfp4, uint8 "
        "scales of 1 x 32" in text
    )
    assert main(["plan", str(tmp_path / "c"), "--quantized", "dequantize"]) == 0
    assert "they are held decoded, in bfloat16" in " ".join(capsys.readouterr().out.split())


def test_quantized_is_keep_or_dequantize(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"quantized is \"keep\" or \"dequantize\"; got 'packed'"):
        jaxmoe.plan(directory(tmp_path / "c", TINY), quantized="packed")


def test_activations_that_a_checkpoint_asks_for_are_told(tmp_path, capsys) -> None:
    path = str(directory(tmp_path / "c", TINY, quantization_config=FP8))
    asked = "asks for activations in fp8 with a scale for each 128 inputs ("
    for command, in_effect in (("inspect", False), ("plan", False), ("plan", True)):
        assert main([command, path, *(["--activations", "checkpoint"] if in_effect else [])]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert asked in text
        assert ("inputs in fp8" in text) == in_effect
    found = jaxmoe.plan(path, activations="checkpoint")
    assert all(form.endswith("inputs in fp8 with a scale for each 128 inputs") for form in found.held["routed experts"])
    assert any(
        "layers.*.attention.w_kv_b" in note and "goes with weights that stay packed" in note for note in found.notes
    )
    with pytest.raises(ValueError, match=r"activations is \"checkpoint\" or None; got 'fp8'"):
        jaxmoe.plan(path, activations="fp8")


def test_modules_of_a_wrapper_are_called_as_in_its_files(tmp_path) -> None:
    text = {key: value for key, value in TINY.items() if key not in ("model_type", "dtype")}
    config = {"model_type": "kimi_k25", "dtype": "bfloat16", "text_config": {**text, "model_type": "deepseek_v3"}}
    settings = {**FP8, "modules_to_not_convert": ["language_model.model.layers.0.self_attn", "lm_head"]}
    stored = jaxmoe.plan(directory(tmp_path / "c", config, quantization_config=settings)).stored
    assert set(stored.formats["attention"]) == {"plain", "fp8_block"}
    assert set(stored.formats["routed experts"]) == {"fp8_block"}


@pytest.mark.parametrize(
    ("entry", "apart"),
    [
        ("model.layers.1.mlp.experts.3", True),
        ("model.layers.*.mlp.experts.*.down_proj", False),
        ("*.3.*", True),
        (r"re:.*layers\.1\..*down_proj", False),
        (r"re:.*experts\.[0-3]\.", True),
        (r"re:.*experts\..\.down_proj", True),
    ],
)
def test_one_expert_stands_for_all_where_no_setting_tells_them_apart(entry, apart, tmp_path) -> None:
    settings = {**FP8, "weight_block_size": [8, 8], "modules_to_not_convert": [entry]}
    checkpoint = PlannedCheckpoint.read(directory(tmp_path / "c", TINY, quantization_config=settings))
    specs = abstract_specs(checkpoint.config)
    every, one = (checkpoint.onto(specs, one_expert=one_expert) for one_expert in (False, True))
    assert stored_weights(one, "fp8") == stored_weights(every, "fp8")
    assert len(stored_weights(one, "fp8").formats["routed experts"]) == 2, "nothing is left plain"
    assert (len(one.checkpoint.tensors) == len(every.checkpoint.tensors)) is apart
    everything = set(one.specs)
    assert choose_packings(one, everything, np.dtype(np.float32)) == choose_packings(
        every, everything, np.dtype(np.float32)
    )


def test_what_cannot_be_loaded_is_not_planned(tmp_path) -> None:
    settings = {"group_size": 64, "bits": 4}
    with pytest.raises(QuantizationError, match="is none that jaxmoe decodes"):
        jaxmoe.plan(directory(tmp_path / "c", TINY, quantization=settings))
