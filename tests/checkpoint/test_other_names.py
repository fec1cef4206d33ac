"""Tensors under other names than their family's: loaded by a rule that is reported, or refused with what is there."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint import CheckpointError
from jaxmoe.models import FAMILIES, ExpertTensors
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of
from tests.support.saved import read_all
from tests.support.writing import write_checkpoint

Tensors = dict[str, np.ndarray]


def written(directory: Path, source: Path, tensors: Tensors) -> Path:
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors*", "*.bin*"))
    return write_checkpoint(directory, tensors)


def values(model: jaxmoe.Decoder) -> dict[str, np.ndarray]:
    from jaxmoe.layers import params_by_path

    return {path: np.asarray(jax.device_get(param.get_value())) for path, param in params_by_path(model).items()}


def check_same(directory: Path, source: Path) -> jaxmoe.Decoder:
    """Both load to the same parameters."""
    mesh = mesh_of(1, 1, 2)
    found, wanted = jaxmoe.load(directory, mesh=mesh), values(jaxmoe.load(source, mesh=mesh))
    for path, value in values(found).items():
        np.testing.assert_array_equal(value, wanted[path], err_msg=path)
    return found


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> Tensors:
    return {rename(name): value for name, value in tensors.items()}


def in_model(old: str) -> Callable[[str], str]:
    return lambda name: name.replace("model.", old, 1) if name.startswith("model.") else name


PREFIXES: dict[str, tuple[Callable[[str], str], str]] = {
    "DeepSpeed": (lambda name: f"module.{name}", "names begin with 'module.', which is left out"),
    "torch.compile in DDP": (lambda name: f"module._orig_mod.{name}", "names begin with 'module._orig_mod.'"),
    "a text part": (in_model("model.language_model."), "'model.language_model.' is 'model.'"),
    "a text part with its head": (lambda name: f"language_model.{name}", "'language_model.' is left out"),
    "a base model": (lambda name: name.removeprefix("model."), "behind 'model.'"),
    "DDP around a text part": (
        lambda name: f"module.{in_model('model.language_model.')(name)}",
        "names begin with 'module.', which is left out; in names 'model.language_model.' is 'model.'",
    ),
}


@pytest.mark.parametrize("case", PREFIXES)
def test_a_known_prefix_is_left_out_and_reported(case, tmp_path):
    rename, rule = PREFIXES[case]
    source = GOLDENS / "mixtral" / "original"
    model = check_same(written(tmp_path / "c", source, renamed(read_all(source), rename)), source)
    ((told, count),) = model.load_report.renamed.items()
    assert rule in told
    assert count == sum(rename(name) != name for name in read_all(source))


def test_a_checkpoint_under_its_own_names_is_reported_without_a_rule():
    assert jaxmoe.load(GOLDENS / "mixtral" / "original", mesh=mesh_of(1, 1, 1)).load_report.renamed == {}


def test_a_text_config_beside_a_whole_multimodal_model(tmp_path):
    whole, text = GOLDENS / "gemma4" / "original", tmp_path / "text"
    shutil.copytree(whole, text)
    config = json.loads((whole / "config.json").read_text())
    (text / "config.json").write_text(json.dumps({**config["text_config"], "dtype": config["dtype"]}))
    model = check_same(text, whole)
    assert ["names are those of the text part of gemma4" in rule for rule in model.load_report.renamed] == [True]
    assert len(model.load_report.ignored["vision part"]) > 0


def test_a_conversion_gives_them_the_names_of_their_family(tmp_path):
    source = GOLDENS / "qwen3_moe" / "original"
    tensors = renamed(
        read_all(source), lambda name: f"module.{name.replace('gate_proj', 'w1').replace('up_proj', 'w3')}"
    )
    tensors = renamed(tensors, lambda name: name.replace("down_proj", "w2"))
    jaxmoe.convert(written(tmp_path / "c", source, tensors), tmp_path / "out")
    assert read_all(tmp_path / "out").keys() == read_all(source).keys()
    check_same(tmp_path / "out", source)


def test_an_unknown_prefix_is_refused_with_the_nearest_name(tmp_path):
    source = GOLDENS / "mixtral" / "original"
    directory = written(tmp_path / "c", source, renamed(read_all(source), lambda name: f"my_own.{name}"))
    with pytest.raises(CheckpointError) as caught:
        jaxmoe.load(directory, mesh=mesh_of(1, 1, 1))
    assert str(caught.value).startswith(f"{directory}: the experts of a layer must be there as ")
    assert "the nearest is 'my_own.model.layers.0." in str(caught.value)


def test_a_missing_tensor_is_refused_with_the_nearest_name_and_a_head_with_its_tie(tmp_path):
    source = GOLDENS / "mixtral" / "original"
    swapped = {"model.norm.weight": "model.final_norm.weight", "lm_head.weight": "head.weight"}
    directory = written(tmp_path / "c", source, renamed(read_all(source), lambda name: swapped.get(name, name)))
    with pytest.raises(CheckpointError) as caught:
        jaxmoe.load(directory, mesh=mesh_of(1, 1, 1))
    assert "'model.norm.weight' is missing" in str(caught.value)
    assert "the nearest name that is there is 'model.final_norm.weight'" in str(caught.value)
    assert "config.json says tie_word_embeddings: true" in str(caught.value)


@dataclasses.dataclass
class Expert:
    """The matrices of one layer, stacked, (out, in), and their biases."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray
    biases: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


def taken_apart(tensors: Tensors, names: ExpertTensors) -> Expert:
    """Take the experts of a layer out of its tensors, whichever layout they have there."""
    if names.fused_gate_up is None or names.fused_gate_up not in tensors:
        stacks = zip(*[[tensors.pop(name) for name in names.per_expert(e)] for e in range(11)], strict=True)
        return Expert(*map(np.stack, stacks))
    gate_up, down = tensors.pop(names.fused_gate_up), tensors.pop(names.fused_down)
    biases = None
    if names.fused_layout != "fused":
        gate_up, down = gate_up.swapaxes(1, 2), down.swapaxes(1, 2)
    half = gate_up.shape[1] // 2
    gate, up = (slice(0, None, 2), slice(1, None, 2))
    if names.fused_layout != "fused_interleaved":
        gate, up = slice(0, half), slice(half, None)
    if names.fused_gate_up_bias:
        bias = tensors.pop(names.fused_gate_up_bias)
        biases = bias[:, gate], bias[:, up], tensors.pop(names.fused_down_bias)
    return Expert(gate_up[:, gate], gate_up[:, up], down, biases)


def one_by_one(experts: str, layer: Expert, gate="gate_proj", up="up_proj", down="down_proj") -> Tensors:
    result = {}
    for part, stack in ((gate, layer.gate), (up, layer.up), (down, layer.down)):
        result |= {f"{experts}.{e}.{part}.weight": value for e, value in enumerate(stack)}
    for part, stack in zip((gate, up, down), layer.biases or (), strict=bool(layer.biases)):
        result |= {f"{experts}.{e}.{part}.bias": value for e, value in enumerate(stack)}
    return result


def stacked(block: str, layer: Expert, names: tuple[str, str, str], suffix: str = "") -> Tensors:
    stacks = zip(names, (layer.gate, layer.up, layer.down), strict=True)
    result = {f"{block}.{name}{suffix}": stack for name, stack in stacks}
    for name, bias in zip(names, layer.biases or (), strict=bool(layer.biases)):
        result[f"{block}.{name}{'.bias' if suffix else '_bias'}"] = bias
    return result


def fused(gate_up: str, down: str, layer: Expert, turn: bool = False) -> Tensors:
    both = np.concatenate([layer.gate, layer.up], axis=1)
    return {gate_up: both.swapaxes(1, 2) if turn else both, down: layer.down.swapaxes(1, 2) if turn else layer.down}


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
WRITERS: dict[str, Callable[[str, Expert], Tensors]] = {
    "one by one, by transformers'": lambda block, layer: one_by_one(f"{block}.experts", layer),
    "one by one, by Mixtral's": lambda block, layer: one_by_one(f"{block}.experts", layer, "w1", "w3", "w2"),
    "stacked, gate and up apart": lambda block, layer: stacked(f"{block}.experts", layer, PROJECTIONS),
    "stacked by MLX's": lambda block, layer: stacked(f"{block}.switch_mlp", layer, PROJECTIONS, ".weight"),
    "stacked by torchtitan's": lambda block, layer: stacked(f"{block}.experts", layer, ("w1", "w3", "w2")),
    "fused, with .weight": lambda block, layer: fused(
        f"{block}.experts.gate_up_proj.weight", f"{block}.experts.down_proj.weight", layer
    ),
    "fused by vLLM's": lambda block, layer: fused(f"{block}.experts.w13_weight", f"{block}.experts.w2_weight", layer),
    "fused by vLLM's, turned": lambda block, layer: fused(
        f"{block}.experts.w13_weight", f"{block}.experts.w2_weight", layer, turn=True
    ),
}
BLOCKS = {
    "qwen3_moe": "model.layers.{layer}.mlp",
    "gpt_oss": "model.layers.{layer}.mlp",
    "llama4_text": "model.layers.{layer}.feed_forward",
    "gemma4_text": "model.layers.{layer}",
    "granitemoe": "model.layers.{layer}.block_sparse_moe",
}


@pytest.mark.covering(most=10)
@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("family", BLOCKS)
def test_experts_by_names_of_other_tools_are_loaded_and_reported(family, how, tmp_path):
    source = GOLDENS / family / "original"
    tensors = read_all(source)
    own = FAMILIES[family].experts
    config = FAMILIES[family].read_config(json.loads((source / "config.json").read_text()))
    changed = 0
    for layer in config.moe_layers:
        before = len(tensors)
        experts = taken_apart(tensors, own.for_layer(layer))
        if experts.biases is not None and how.startswith("fused"):
            pytest.skip("gate and up may alternate in one tensor there, so it is not guessed")
        found = WRITERS[how](BLOCKS[family].format(layer=layer), experts)
        if own.for_layer(layer).are_in(found):
            pytest.skip("the family's own names")
        assert len(tensors) < before
        tensors |= found
        changed += len(found)
    model = check_same(written(tmp_path / "c", source, tensors), source)
    ((rule, count),) = model.load_report.renamed.items()
    assert how.partition(", turned")[0] in rule
    assert count == changed


def test_interleaved_experts_are_not_guessed(tmp_path):
    source = GOLDENS / "gpt_oss" / "original"
    tensors = renamed(read_all(source), lambda name: name.replace("gate_up_proj", "w13_weight"))
    with pytest.raises(
        CheckpointError, match=r"the nearest is 'model\.layers\.0\.mlp\.experts\.w13_weight|needs it with"
    ):
        jaxmoe.load(written(tmp_path / "c", source, tensors), mesh=mesh_of(1, 1, 1))
