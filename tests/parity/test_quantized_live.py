"""Quantized checkpoints against transformers, which decodes them by code of its own."""

import json

import numpy as np
import pytest

import jaxmoe
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import write_pair, write_plain
from tests.support.rounding import CASES as ROUNDING
from tests.support.rounding import PRODUCTS, write_rounding

torch = pytest.importorskip("torch", reason="live parity needs torch and transformers: scripts/test --parity")
transformers = pytest.importorskip(
    "transformers", reason="live parity needs torch and transformers: scripts/test --parity"
)

pytestmark = pytest.mark.parity

TOKENS = np.arange(18).reshape(2, 9) * 5 % 97
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
    expected = logits_of(read(quantized, quantization_config=decoded(dequantize=True)))
    check_ours(quantized, expected)


@pytest.mark.filterwarnings("ignore:You passed .quantization_config. or equivalent:UserWarning")
@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("qwen3_moe", "fp8_block"),
        ("deepseek_v3", "int4_group"),
        ("mixtral", "int8"),
        ("glm4_moe", "mxfp4"),
        ("gpt_oss", "mxfp4"),
    ],
)
def test_transformers_reads_what_convert_quantizes(family, target, tmp_path) -> None:
    source = write_plain(tmp_path / "source", family)
    jaxmoe.convert(source, tmp_path / "quantized", quantize=target)
    jaxmoe.convert(tmp_path / "quantized", tmp_path / "decoded", dtype="float32")
    settings = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    decoded = {
        "fp8": transformers.FineGrainedFP8Config,
        "mxfp4": transformers.Mxfp4Config,
        "compressed-tensors": transformers.CompressedTensorsConfig,
    }[settings["quant_method"]]
    if settings["quant_method"] == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="it decodes these: scripts/test --parity")
    theirs = read(tmp_path / "quantized", quantization_config=decoded(dequantize=True))
    plain = read(tmp_path / "decoded")
    weights, expected = theirs.state_dict(), plain.state_dict()
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(weights[name].float(), values), name
    check_ours(tmp_path / "quantized", logits_of(plain))


def read(path, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


def logits_of(theirs) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.tensor(TOKENS)).logits.numpy()


def check_ours(path, expected: np.ndarray) -> None:
    model = jaxmoe.load(path, mesh=mesh_of(2, 2, 2), placement="round_robin", dtype="float32")
    assert np.abs(np.asarray(model(TOKENS)) - expected).max() < 1e-4 * np.abs(expected).max()


# DeepSeek's kv_b_proj is decoded, and so its inputs are not rounded.
@pytest.mark.parametrize("case", [case for case in ROUNDING if case[0] != "deepseek_v3"], ids=lambda case: case[-1])
def test_rounded_activations_are_those_of_rounded_inputs_of_every_linear(case, tmp_path, monkeypatch) -> None:
    """transformers rounds on GPUs only: here numpy does it, before each of its products with a quantized matrix."""
    family, weights, block, form = case
    quantized, plain = write_rounding(tmp_path, family, weights, block)
    theirs = read(plain, experts_implementation="eager")
    PRODUCTS.start(quantized, plain, form)
    product = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        matrices = [weight.numpy()]
        if not PRODUCTS.knows(matrices[0]):
            matrices = [half.numpy() for half in weight.chunk(2)]  # gate and up of an expert
        return product(torch.from_numpy(PRODUCTS.round(x.numpy(), *matrices)), weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    expected = logits_of(theirs)
    assert 2 * len(PRODUCTS.met) > len(PRODUCTS.scales)  # some experts get no token
    load = {"mesh": mesh_of(2, 2, 2), "placement": "round_robin", "dtype": "float32"}
    ours = np.asarray(jaxmoe.load(quantized, **load, activations="checkpoint")(TOKENS))
    errors = np.abs(ours - expected).max(-1) / np.abs(expected).max()
    assert np.median(errors) < 1e-4
