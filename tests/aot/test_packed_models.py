"""Whole models whose weights stay packed, at their published widths, compiled for GPUs that are not here.

As in test_models.py each is cut down to the few layers that have one of every kind.
"""

import json
from typing import Any

import jax
import pytest

import jaxmoe
from jaxmoe.models import read_model_config
from jaxmoe.planning.memory import plan
from jaxmoe.planning.steps import compile_steps
from jaxmoe.planning.topology import gpu_topology
from tests.support.packed_programs import check_arguments, check_nothing_is_decoded
from tests.support.published import DEEPSEEK_V3_FP8, GPT_OSS_120B_MXFP4, QWEN3_30B_FP8

MB = 2**20
BATCH, PROMPT, LENGTH = 8, 256, 512

# The end of a form whose inputs are rounded as the checkpoint asks, with activations="checkpoint".
ROWS = ", inputs in fp8 with a scale for each 128 inputs"
# Config, chip, GPUs, mesh, and what its experts are held in.
MODELS: dict[str, tuple[dict[str, Any], str, int, dict[str, int], str]] = {
    "gpt-oss-120b": (GPT_OSS_120B_MXFP4, "h100", 1, {}, "mxfp4, uint8 scales of 1 x 32"),
    "qwen3-30b-a3b-fp8": (QWEN3_30B_FP8, "h100", 1, {}, "float8_e4m3fn, float32 scales of 128 x 128"),
    "deepseek-v3, fp8 rows": (
        DEEPSEEK_V3_FP8,
        "h100",
        8,
        {"ep": 8},
        f"float8_e4m3fn, float32 scales of 128 x 128{ROWS}",
    ),
    "deepseek-v3, ep 8": (DEEPSEEK_V3_FP8, "h200", 8, {"ep": 8}, "float8_e4m3fn, float32 scales of 128 x 128"),
}
# Kernels, and for each program its products by the Hopper kernel and the most temporary memory in MB: what was seen and a
# quarter more. A prefill of DeepSeek has a product of the experts for the first round of the exchange and one for others.
CASES = [
    ("gpt-oss-120b", "mosaic_gpu", {"prefill": (4, 262), "decode": (4, 2)}),
    ("qwen3-30b-a3b-fp8", "mosaic_gpu", {"prefill": (6, 221), "decode": (6, 1)}),
    ("deepseek-v3, ep 8", "mosaic_gpu", {"prefill": (18, 258), "decode": (16, 3)}),
    pytest.param(
        "deepseek-v3, fp8 rows", "mosaic_gpu", {"prefill": (18, 250), "decode": (16, 3)}, marks=pytest.mark.full
    ),
    pytest.param("gpt-oss-120b", "auto", {"prefill": (0, 449), "decode": (0, 23)}, marks=pytest.mark.full),
    pytest.param("qwen3-30b-a3b-fp8", "auto", {"prefill": (0, 293), "decode": (0, 24)}, marks=pytest.mark.full),
]


@pytest.mark.covering
@pytest.mark.parametrize(("model", "kernels", "expected"), CASES)
def test_both_steps_compile_packed(model, kernels, expected, gpu_compiler, tmp_path) -> None:
    if kernels == "mosaic_gpu" and jax.__version_info__ < (0, 11, 2):
        pytest.skip("the kernel needs jax 0.11.2")
    raw, chip, count, sizes, form = MODELS[model]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    options = {"batch_size": BATCH, "max_length": LENGTH, "activations": "checkpoint" if ROWS in form else None}
    planned = plan(tmp_path, **sizes, dtype="bfloat16", **options)
    assert planned.held["routed experts"].keys() == {form}
    mesh = jaxmoe.make_mesh(**sizes, devices=list(gpu_topology(chip, count)))
    steps = compile_steps(tmp_path, mesh, kernels=kernels, prompt_length=PROMPT, **options)
    assert steps.keys() == expected.keys()
    for name, step in steps.items():
        products, bound = expected[name]
        calls = [line for line in step.text.splitlines() if 'custom_call_target="mosaic_gpu' in line]
        assert len(calls) == products
        if ROWS in form:
            assert {call.count("f8e4m3fn[") for call in calls} == {2}, "a product is not of fp8 by fp8"
        check_arguments(step, planned)
        check_nothing_is_decoded(step, read_model_config(tmp_path)[1], mesh.size)
        assert step.temp_bytes <= bound * MB
