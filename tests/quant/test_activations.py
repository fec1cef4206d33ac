"""Forms of activations as settings ask for them."""

import pytest

from jaxmoe.kernels.grouped_matmul import ROW_FORMATS
from jaxmoe.quant import QuantizationError, find_quantization
from jaxmoe.quant.packing import ROW_FORMS, is_static
from tests.support.rounding import BLOCKS, TENSOR, TOKEN, channels

MODULE = "model.layers.0.mlp.experts.3.up_proj"
PER_TENSOR = {"quant_method": "fp8"}
# (settings, name of the form that kernels have or None, the form in words or the start of them).
CASES = [
    (BLOCKS, "fp8_block", None),
    (BLOCKS | {"scale_fmt": "ue8m0"}, "fp8_block_e8m0", None),
    (BLOCKS | {"activation_scheme": "static"}, "fp8_static", None),
    (BLOCKS | {"weight_block_size": [64, 64]}, None, "fp8 with a scale for each 64 inputs"),
    (PER_TENSOR | {"activation_scheme": "dynamic"}, "fp8_token", None),
    (PER_TENSOR | {"activation_scheme": "static"}, "fp8_static", None),
    (PER_TENSOR | {"activation_scheme": "other"}, None, "fp8, activation_scheme 'other'"),
    (PER_TENSOR | {"activation_scheme": None}, None, None),
    ({"quant_algo": "FP8"}, "fp8_static", None),
    ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, "fp8_token", None),
    ({"quant_algo": "FP8_PB_WO"}, None, None),
    ({"quant_algo": "FP8_BLOCK_SCALES"}, "fp8_block", None),
    ({"quant_algo": "MXFP8"}, None, "fp8 with a scale for each 32 inputs, a power of two"),
    ({"quant_algo": "NVFP4"}, None, "4-bit floats in groups of 16"),
    ({"quant_algo": "W4A16_NVFP4"}, None, None),
    ({"quant_algo": "W4A8_NVFP4_FP8"}, "fp8_static", None),
    ({"quant_method": "fbgemm_fp8"}, None, "fp8 with a scale for each token, up to an upper bound"),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, None, "int8 with a scale for each token, outliers apart"),
    ({"quant_method": "gptq", "bits": 4}, None, None),
    (channels("int", **TOKEN), "int8_token", None),
    (channels("int", **TENSOR), "int8_static", None),
    (channels("float", **TOKEN), "fp8_token", None),
    (channels("float", **TENSOR), "fp8_static", None),
    (channels("float", strategy="group", group_size=128, dynamic=True), "fp8_block", None),
    (channels("float", strategy="tensor", dynamic=True), None, "8-bit float, dynamic scales of tensor"),
    (channels("int", **TOKEN | {"symmetric": False}), None, "8-bit int, dynamic scales of token, zero points"),
    (channels("int", **TOKEN | {"num_bits": 4}), None, "4-bit int, dynamic scales of token"),
]


@pytest.mark.parametrize(("settings", "form", "words"), CASES)
def test_settings_ask_for_a_form(settings, form, words) -> None:
    found = find_quantization({"quantization_config": settings}).format_of(MODULE).activations
    if form is None and words is None:
        assert found is None
        return
    assert found.form == form
    assert found.asked.startswith(ROW_FORMS[form] if words is None else words)
    assert found.is_static == (form is not None and "static" in form)


def test_forms_are_those_of_the_kernels() -> None:
    assert [*ROW_FORMS] == [name for name in ROW_FORMATS if name != "none"]
    assert all(is_static(name) == ROW_FORMATS[name].static for name in ROW_FORMS)


def test_activations_without_settings_of_their_own_are_none() -> None:
    block = channels("int", **TOKEN)
    block["config_groups"]["group_0"]["input_activations"] = None
    assert find_quantization({"quantization_config": block}).format_of(MODULE).activations is None
    block["config_groups"]["group_0"]["input_activations"] = 8
    with pytest.raises(QuantizationError, match=r"input_activations .*object"):
        find_quantization({"quantization_config": block})
