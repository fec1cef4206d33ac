"""A checkpoint as its family maps it: one object and one check for all that read or write checkpoints."""

import json
import shutil

import numpy as np
import pytest

from jaxmoe.checkpoint import CheckpointError
from jaxmoe.checkpoint.errors import Problems
from jaxmoe.checkpoint.formats import decode_checkpoint, open_checkpoint
from jaxmoe.checkpoint.mapping import FamilyCheckpoint, MappedCheckpoint, abstract_specs
from jaxmoe.models import read_model_config
from jaxmoe.quant import QuantizationError
from tests.support.goldens import GOLDENS
from tests.support.saved import SOURCES, read_all
from tests.support.writing import write_checkpoint

QWEN = GOLDENS / "qwen3_moe" / "original"
GATE = "model.layers.0.mlp.experts.3.gate_proj.weight"


def found_problems(mapped: MappedCheckpoint) -> list[str]:
    problems = Problems("the test")
    mapped.check(problems)
    return problems.found


def qwen(directory, tensors: dict[str, np.ndarray], **config) -> FamilyCheckpoint:
    """The checkpoint with other tensors and settings."""
    shutil.copytree(QWEN, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    write_checkpoint(directory, tensors)
    (directory / "config.json").write_text(json.dumps(json.loads((QWEN / "config.json").read_text()) | config))
    return FamilyCheckpoint.of(decode_checkpoint(open_checkpoint(directory)), *read_model_config(directory))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_every_family_fills_all_its_parameters_and_leaves_nothing_over(source) -> None:
    found = FamilyCheckpoint.open(source)
    mapped = found.onto(abstract_specs(found.config))
    problems = Problems("the test")
    unused = mapped.check(problems)
    assert problems.found == []
    assert unused.uncovered == ()
    used = {name for name, _ in mapped.used_blocks()}
    ignored = [name for names in unused.ignored.values() for name in names]
    assert used.isdisjoint(ignored)
    assert used | set(ignored) == found.checkpoint.tensors.keys()


def test_a_part_may_leave_tensors_over_and_needs_its_own(tmp_path) -> None:
    tensors = read_all(QWEN)
    del tensors[GATE]
    found = qwen(tmp_path / "c", tensors)
    specs = abstract_specs(found.config)
    mapped = found.onto(specs)
    (missing,) = found_problems(mapped)
    assert missing.startswith(f"tensor '{GATE}' is missing: layers.0.moe.w_gate_up needs it")
    assert found_problems(mapped.part({"norm.weight": specs["norm.weight"]})) == []
    assert found_problems(mapped.part({path: specs[path] for path in ["layers.0.moe.w_gate_up"]})) == [missing]


def test_a_form_that_is_not_there_is_mapped_when_it_is_asked_for(tmp_path) -> None:
    found = qwen(tmp_path / "c", {name: value for name, value in read_all(QWEN).items() if ".experts." not in name})
    specs = abstract_specs(found.config)
    with pytest.raises(CheckpointError, match="the checkpoint has neither"):
        found.onto(specs)
    layers = len(found.config.moe_layers)
    problems = found_problems(found.onto(specs, form="fused"))
    missing = [problem.split("'")[1].rpartition(".")[2] for problem in problems]
    assert sorted(missing) == layers * ["down_proj"] + layers * ["gate_up_proj"]
    experts = found.config.layers[0].feed_forward.num_experts
    assert len(found_problems(found.onto(specs, form="per_expert"))) == layers * experts * 3


def test_settings_beside_plain_weights_are_left_over_and_others_must_fit(tmp_path) -> None:
    tensors = read_all(QWEN)
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    assert not qwen(tmp_path / "plain", tensors, **settings).formats
    with pytest.raises(
        QuantizationError, match=r"quantization bitsandbytes of config.json has 1 problem: .*3.gate_proj"
    ):
        qwen(tmp_path / "coded", tensors | {GATE: tensors[GATE].astype(np.uint8)}, **settings)
