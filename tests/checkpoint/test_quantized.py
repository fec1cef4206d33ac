"""Checkpoints in the quantized formats that people publish: they load as the plain ones that hold the decoded values."""

import json

import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint.inspection import summarize
from tests.support.meshes import mesh_id, mesh_of
from tests.support.quantized_checkpoints import write_pair
from tests.support.saved import assert_same_parameters, read_all

IGNORED = ["lm_head", "re:.*gate$"]


def compressed(form, **weights):
    settings = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True, **weights}
    group = {"targets": ["Linear"], "weights": settings}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": IGNORED,
    }


CHANNEL = {"num_bits": 8, "strategy": "channel", "group_size": None}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq"}
FP8 = {"quant_method": "fp8", "weight_block_size": [24, 40], "activation_scheme": "dynamic"}
# (family, format as in tests/support/quantized.py, block of config.json). A format is tested by being listed.
CASES = [
    ("qwen3_moe", "fp8_block", FP8),
    ("deepseek_v3", "fp8_block", FP8),
    ("qwen3_moe", "fp8_tensor", {"quant_method": "fp8", "activation_scheme": "static"}),
    (
        "glm4_moe",
        "fp8_channel",
        compressed("float-quantized", num_bits=8, type="float", strategy="channel", group_size=None),
    ),
    ("qwen3_moe", "int_quantized", compressed("int-quantized", **CHANNEL)),
    ("deepseek_v3", "pack_quantized", compressed("pack-quantized", symmetric=False)),
    ("mixtral", "pack_quantized, order", compressed("pack-quantized", symmetric=False, actorder="group")),
    (
        "glm4_moe",
        "nvfp4_pack",
        compressed("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16),
    ),
    ("qwen3_moe", "mxfp4_pack", compressed("mxfp4-pack-quantized", type="float")),
    ("qwen3_moe", "gptq", {**GPTQ, "desc_act": False}),
    ("mixtral", "gptq, order", {**GPTQ, "desc_act": True}),
    ("qwen3_moe", "awq", {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    ("gpt_oss", "mxfp4", {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}),
    ("deepseek_v3", "nvfp4", {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*.gate"]}),
    ("qwen3_moe", "bnb_4bit", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ("mixtral", "bnb_int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
]


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{form}" for family, form, _ in CASES])
def pair(request, tmp_path_factory):
    family, form, block = request.param
    return *write_pair(tmp_path_factory.mktemp("quantized"), family, form, block), form


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 2)], ids=mesh_id)
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_it_loads_as_its_values_do(pair, shape, placement) -> None:
    quantized, plain, count, form = pair
    models = [
        jaxmoe.load(path, mesh=mesh_of(*shape), placement=placement, dtype="float32", quantized="dequantize")
        for path in (quantized, plain)
    ]
    assert_same_parameters(*models)
    report = models[0].load_report
    assert sum(report.decoded.values()) == count > 20 or form == "mxfp4"
    assert report.bytes_needed <= report.bytes_read < 2 * report.bytes_needed  # tables are read for every piece
    assert report.bytes_needed < models[1].load_report.bytes_needed
    assert report.bytes_per_device == models[1].load_report.bytes_per_device


def test_it_is_converted_to_its_values(pair, tmp_path) -> None:
    quantized, plain, _, _ = pair
    jaxmoe.convert(quantized, tmp_path / "out", dtype="float32")
    jaxmoe.convert(plain, tmp_path / "expected", dtype="float32")
    ours, theirs = read_all(tmp_path / "out"), read_all(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_it_is_inspected_as_what_it_holds(pair) -> None:
    quantized, plain, _, _ = pair
    found, expected = summarize(quantized), summarize(plain)
    assert not found.problems
    assert found.quantization is not None
    assert (found.parameters, found.active_parameters) == (expected.parameters, expected.active_parameters)
    assert found.bytes < expected.bytes
