"""Compiled steps on simulated devices; tests/aot has them for GPUs."""

import json
import re

import pytest

from jaxmoe.models import get_family
from jaxmoe.planning import compile_steps, plan
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of

QWEN = GOLDENS / "qwen3_moe" / "original"
RAW = json.loads((QWEN / "config.json").read_text())
SIZES = {"batch_size": 2, "prompt_length": 5, "max_length": 9}


@pytest.fixture(scope="module")
def config():
    return get_family("qwen3_moe").read_config(RAW)


@pytest.mark.full
def test_both_steps_take_what_the_plan_says(config) -> None:
    steps = compile_steps(config, mesh_of(1, 2, 2), dtype="float32", dispatch="all_to_all", **SIZES)
    assert steps.keys() == {"prefill", "decode"}
    planned = plan(QWEN, tp=2, ep=2, dtype="float32", batch_size=2, max_length=9)
    for step in steps.values():
        extra = step.argument_bytes - planned.held_bytes
        assert 0 <= extra < 4096  # tokens, lengths, places
        assert step.collectives["all-to-all"] > 0
        assert step.temp_bytes > 0


@pytest.mark.full
def test_steps_of_a_checkpoint_take_packed_weights(tmp_path) -> None:
    """The promise of a config.json is enough."""
    block = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"quantization_config": block}))
    sizes = {"tp": 2, "ep": 2, "dtype": "float32", "batch_size": 2, "max_length": 9}
    packed, plain = (plan(path, **sizes).held_bytes for path in (tmp_path, QWEN))
    for step in compile_steps(tmp_path, mesh_of(1, 2, 2), dtype="float32", **SIZES).values():
        assert 0 <= step.argument_bytes - packed < 4096 < plain - packed


@pytest.mark.full
def test_steps_round_inputs_as_the_checkpoint_asks(tmp_path) -> None:
    """Those of packed weights; static scales are arguments too."""
    static = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"quantization_config": static}))
    options = {"dtype": "float32", "activations": "checkpoint", "batch_size": 2, "max_length": 9}
    planned = plan(tmp_path, tp=2, ep=2, **options)
    assert "inputs in fp8 with the scales of the checkpoint" in str(planned.held["routed experts"])
    for step in compile_steps(tmp_path, mesh_of(1, 2, 2), prompt_length=5, **options).values():
        assert 0 <= step.argument_bytes - planned.held_bytes < 4096
        assert re.search(r"f8e4m3fn\[[\d,]*\]\S* convert\(", step.text), "no inputs are rounded"


def test_rounding_for_nothing_is_refused(config, tmp_path) -> None:
    mesh = mesh_of(1, 1, 1)
    weights_only = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
    (tmp_path / "config.json").write_text(json.dumps(RAW | {"quantization_config": weights_only}))
    for given, wrong, message in (
        (config, "checkpoint", "got a config, whose weights are plain; give the checkpoint's path"),
        (tmp_path, "checkpoint", "would round the inputs of no weight"),
        (tmp_path, "fp8_token", 'activations is "checkpoint" or None; got .fp8_token.'),
    ):
        with pytest.raises(ValueError, match=message):
            compile_steps(given, mesh, activations=wrong, **SIZES)


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"prompt_length": 0}, {"prompt_length": 10}, {"max_length": 4}, {"max_length": 10**6}],
    ids=str,
)
def test_sizes_that_no_step_has_are_refused(wrong, config) -> None:
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=rf"1 <= prompt_length <= max_length <= .*; got .*{name} {value}\b"):
        compile_steps(config, mesh_of(1, 1, 1), **SIZES | wrong)
