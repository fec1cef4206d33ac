"""Quantized checkpoints against transformers, which decodes them by code of its own."""

import numpy as np
import pytest

import jaxmoe
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import write_pair

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
transformers = pytest.importorskip(
    "transformers", reason="live parity needs torch and transformers: scripts/test --parity"
)

pytestmark = pytest.mark.parity

WIDTHS = {"hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


@pytest.mark.parametrize(
    ("family", "form", "block"),
    [("qwen3_moe", "fp8_block, 32", FP8), ("deepseek_v3", "fp8_block, 32", FP8), ("gpt_oss", "mxfp4", MXFP4)],
)
def test_logits_are_those_of_transformers(family, form, block, tmp_path) -> None:
    quantized, _, _ = write_pair(tmp_path, family, form, block, WIDTHS)
    decoded = transformers.Mxfp4Config if form == "mxfp4" else transformers.FineGrainedFP8Config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        quantized, quantization_config=decoded(dequantize=True), dtype=torch.float32
    )
    tokens = np.arange(18).reshape(2, 9) * 5 % 97
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    logits = np.asarray(jaxmoe.load(quantized, mesh=mesh_of(2, 2, 2), placement="round_robin", dtype="float32")(tokens))
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
