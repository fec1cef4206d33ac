"""Settings of every method: what they name, and what is refused with a way out."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxmoe.quant import QuantFormat, QuantizationError, find_quantization, read_quantization
from jaxmoe.quant.configs import READERS
from jaxmoe.quant.formats import (
    AwqGemm,
    Bnb4Bit,
    BnbInt8,
    FbgemmFp8,
    Fp8Block,
    Fp8Channel,
    Fp8Tensor,
    Gptq,
    IntQuantized,
    Mxfp4Blocks,
    Mxfp4Pack,
    Nvfp4,
    Nvfp4Pack,
    PackQuantized,
)
from jaxmoe.quant.names import Names

EXPERT = "model.layers.1.mlp.experts.2.up_proj"
ATTENTION = "model.layers.1.self_attn.q_proj"


def weights(**settings: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"weights": settings, "targets": ["Linear"]}}}


def compressed(form: str | None = None, **settings: Any) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": form, **weights(**settings)}


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
BLOCKS: list[tuple[dict[str, Any], QuantFormat]] = [
    ({"quant_method": "fp8", "weight_block_size": [64, 128]}, Fp8Block((64, 128))),
    ({"quant_method": "fp8", "activation_scheme": "static"}, Fp8Tensor()),
    ({"quant_method": "FP8", "fmt": None}, Fp8Tensor()),
    ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, FbgemmFp8()),
    (compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32), PackQuantized(4, 32)),
    (compressed("pack-quantized", num_bits=8, type="int", strategy="channel"), PackQuantized(8)),
    (compressed("pack-quantized", num_bits=4, group_size=32), PackQuantized(4, 32)),
    (compressed("int-quantized", num_bits=8, type="int", strategy="channel"), IntQuantized()),
    (compressed("int-quantized", num_bits=8, type="int", strategy="group", group_size=64), IntQuantized(64)),
    (compressed("float-quantized", num_bits=8, type="float", strategy="tensor"), Fp8Tensor()),
    (compressed("float-quantized", num_bits=8, type="float", strategy="channel"), Fp8Channel()),
    (compressed("naive-quantized", num_bits=8, type="float", strategy="channel"), Fp8Channel()),
    (
        compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[128, 128]),
        Fp8Block((128, 128)),
    ),
    (compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16), Nvfp4Pack()),
    (compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32), Mxfp4Pack()),
    (compressed("mxfp8-quantized", num_bits=8, type="float", group_size=32), Fp8Block((1, 32))),
    (compressed(None, num_bits=4, type="float", group_size=16), Nvfp4Pack()),
    (compressed(None, num_bits=4, type="float", group_size=32), Mxfp4Pack()),
    (compressed("mixed-precision", num_bits=4, type="int", group_size=32), PackQuantized(4, 32)),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, Fp8Tensor()),
    ({"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}, Fp8Block()),
    ({"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}, Fp8Channel()),
    ({"quant_method": "modelopt", "quant_algo": "MXFP8"}, Fp8Block((1, 32))),
    ({"quant_method": "modelopt_fp4", "quant_algo": "NVFP4"}, Nvfp4()),
    ({"quant_algo": "W4A16_NVFP4", "group_size": 16}, Nvfp4()),
    (GPTQ, Gptq(4, 128, 1)),
    (GPTQ | {"checkpoint_format": "gptq_v2", "bits": 3, "group_size": -1}, Gptq(3, None, 2)),
    (AWQ, AwqGemm(128)),
    ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True}, AwqGemm(64)),
    ({"quant_method": "mxfp4"}, Mxfp4Blocks()),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, Bnb4Bit("nf4")),
    ({"quant_method": "bitsandbytes", "_load_in_4bit": True}, Bnb4Bit("fp4")),
    ({"quant_method": "bitsandbytes", "load_in_8bit": True}, BnbInt8()),
]


def found(block: dict[str, Any], **config: Any):
    return find_quantization({"quantization_config": block, **config})


@pytest.mark.parametrize(
    ("block", "expected"), BLOCKS, ids=lambda one: None if isinstance(one, dict) else one.describe()
)
def test_a_block_names_a_format(block: dict[str, Any], expected: QuantFormat) -> None:
    assert found(block).format_of(EXPERT) == expected
    assert find_quantization({"text_config": {"quantization_config": block}}).format_of(EXPERT) == expected


def test_every_reader_is_tried_above() -> None:
    methods = {found(block).method for block, _ in BLOCKS}
    assert set(READERS) - methods <= {"compressed_tensors", "modelopt_mixed"}


def test_formats_of_modules_are_told_by_groups() -> None:
    nvfp4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    block = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {
            "experts": {
                "format": "nvfp4-pack-quantized",
                "weights": nvfp4,
                "targets": [r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"],
            },
            "rest": {
                "format": "float-quantized",
                "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
                "targets": ["Linear", "MoEGate"],
            },
        },
        "ignore": ["lm_head", "model.layers.0.self_attn.q_proj"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float"},
    }
    quantization = found(block)
    assert quantization.format_of(EXPERT) == Nvfp4Pack()
    assert quantization.format_of(ATTENTION) == Fp8Block()
    assert quantization.format_of("model.layers.0.self_attn.q_proj") is None
    assert quantization.format_of("lm_head") is None
    assert quantization.format_of("model.embed_tokens") is None
    assert any("kv_cache_scheme (8-bit float) is not followed" in note for note in quantization.notes)
    assert any("['MoEGate'] of rest are classes" in note for note in quantization.notes)


def test_dynamic_of_gptq_leaves_out_and_changes() -> None:
    dynamic = {"-:.*attn.*": {}, "+:.*experts\\.2\\..*": {"bits": 8, "group_size": 64}, ".*experts\\.3\\.": {"bits": 2}}
    quantization = found(GPTQ | {"dynamic": dynamic})
    assert quantization.format_of(ATTENTION) is None
    assert quantization.format_of(EXPERT) == Gptq(8, 64)
    assert quantization.format_of(EXPERT.replace("s.2", "s.3")) == Gptq(2, 128)
    assert quantization.format_of(EXPERT.replace("s.2", "s.4")) == Gptq(4, 128)
    assert quantization.format_of("lm_head") is None
    assert found(GPTQ | {"lm_head": True}).format_of("lm_head") == Gptq(4, 128)
    some = found(GPTQ | {"modules_in_block_to_quantize": [["mlp.experts.2.up_proj"]]})
    assert (some.format_of(EXPERT), some.format_of(ATTENTION)) == (Gptq(4, 128), None)


def test_files_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "quantize_config.json").write_text(
        json.dumps({key: GPTQ[key] for key in GPTQ if key != "quant_method"})
    )
    quantization = read_quantization(tmp_path)
    assert (quantization.method, quantization.source) == ("gptq", "quantize_config.json")
    assert quantization.format_of(EXPERT) == Gptq(4, 128)
    assert read_quantization(tmp_path, {"quantization_config": AWQ}).notes == (
        "quantize_config.json is not read: config.json has the quantization",
    )


def test_a_layer_s_own_algorithm_comes_before_its_block_s() -> None:
    layers = {"model.layers.1": {"quant_algo": "FP8"}, EXPERT: {"quant_algo": "NVFP4", "group_size": 32}}
    quantization = found({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert quantization.format_of(EXPERT) == Nvfp4(32)
    assert quantization.format_of(ATTENTION) == Fp8Tensor()
    assert quantization.format_of("model.layers.2.mlp.experts.2.up_proj") is None


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"quant_method": "aqlm"},
        "config.json says quantization 'aqlm', which is none that jaxmoe decodes: it decodes fp8",
    ),
    ({"quant_method": "quark"}, "Take the model's bfloat16 release"),
    ({"bits": 4, "group_size": 64}, r"'mlx' \(a block with bits and group_size and no quant_method is of MLX"),
    ({"quant_method": "auto-round", "bits": 4}, r"AutoRound writes GPTQ's layout too"),
    ({"quant_method": "fp8", "fmt": "e3m4"}, "fmt 'e3m4' is none that jaxmoe decodes; it decodes e4m3"),
    ({"quant_method": "fp8", "scale_fmt": "ue5m3"}, "scale_fmt 'ue5m3'"),
    (
        {"quant_method": "fp8", "weight_block_size": [128]},
        r"weight_block_size of .* must be two positive sizes; it is \[128\]",
    ),
    ({"quant_method": "fp8", "modules_to_not_convert": "gate"}, "must be a list of modules; it is 'gate'"),
    ({"quant_method": "fp8", "modules_to_not_convert": [1]}, "must hold names; one is 1"),
    (
        {"quant_method": "modelopt", "quant_algo": "NVFP5"},
        "quant_algo 'NVFP5' is none that jaxmoe decodes; it decodes FP8",
    ),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "pre_quant_scale"),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "needs quantized_layers"),
    (GPTQ | {"bits": 5}, "bits 5 is none that jaxmoe decodes"),
    (GPTQ | {"group_size": 0}, "group_size of a quantization must be positive, or -1 for a whole output; it is 0"),
    (GPTQ | {"group_size": "128"}, "group_size of a quantization must be a whole number; it is '128'"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    (GPTQ | {"pack_dtype": "int64"}, "pack_dtype 'int64'"),
    (GPTQ | {"dynamic": {"-:(a*)*": {}}}, "must be matched in short time"),
    (GPTQ | {"dynamic": {"-:.*(": {}}}, "must be a regular expression"),
    (GPTQ | {"dynamic": {"+:.*": 4}}, "dynamic must say an object"),
    (AWQ | {"version": "gemv"}, "version 'gemv' is none that jaxmoe decodes; it decodes gemm"),
    (AWQ | {"bits": 3}, "bits 3 is none that jaxmoe decodes; it decodes 4 bits of AWQ"),
    (AWQ | {"zero_point": False}, "zero_point False"),
    ({"quant_method": "bitsandbytes"}, "must say load_in_4bit or load_in_8bit"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type 'af4'"),
    (compressed("marlin-24", num_bits=4), "format 'marlin-24' is none that jaxmoe decodes; it decodes int-quantized"),
    (compressed("pack-quantized", num_bits=9), "pack-quantized with weights of '9 bits, int'"),
    (compressed("float-quantized", num_bits=8, type="float", strategy="token"), "strategy 'token'"),
    (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format 'sparse-24-bitmask'"),
    (compressed() | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config rotates the inputs"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, "config_groups must name a format"),
    ({"quant_method": "compressed-tensors", "config_groups": {"a": 1}}, "config_groups must say an object for 'a'"),
]


@pytest.mark.parametrize(("block", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_not_known_is_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        found(block)


JUNK = [None, True, 5, -3, 1.5, "x", [], [1], ["re:("], {}, {"a": 1}, {"re:x": None}]


def spoiled(block: Any) -> Iterator[Any]:
    """A block with each of its values, those inside of it too, replaced by what it should not be."""
    yield from JUNK
    if isinstance(block, dict):
        for key, value in block.items():
            yield from ({**block, key: other} for other in spoiled(value))


@pytest.mark.parametrize("block", [block for block, _ in BLOCKS], ids=[form.describe() for _, form in BLOCKS])
def test_settings_of_any_type_are_read_or_refused(block: dict[str, Any]) -> None:
    more = {"ignore": ["a"], "kv_cache_scheme": {}, "dynamic": {}, "quantized_layers": {"a": {"quant_algo": "FP8"}}}
    more |= {"sparsity_config": {}, "transform_config": {}, "moe_quant_algo": None, "modules_to_not_convert": None}
    for other in spoiled(block | more):
        with contextlib.suppress(QuantizationError):
            quantization = found(other)
            assert quantization is None or quantization.format_of(EXPERT) is None or quantization.method


@pytest.mark.parametrize("part", [{}, {"text_config": {}}], ids=["the model", "its text part"])
def test_settings_under_the_key_of_mlx_are_refused(part: dict[str, Any]) -> None:
    settings = {"quantization": {"bits": 4, "group_size": 64}}
    with pytest.raises(QuantizationError, match="'mlx'"):
        find_quantization(dict.fromkeys(part, settings) or settings)


def test_two_files_that_disagree_are_refused() -> None:
    one, other = {"quant_method": "modelopt", "quant_algo": "FP8"}, {"quantization": {"quant_algo": "NVFP4"}}
    with pytest.raises(QuantizationError, match=r"config.json and hf_quant_config.json must agree: .*'FP8'.*'NVFP4'"):
        find_quantization({"quantization_config": one}, {"hf_quant_config.json": other})


@pytest.mark.parametrize(
    ("entry", "named", "other"),
    [
        ("lm_head", "lm_head", "model.lm_header"),
        ("model.layers.1", "model.layers.1.mlp.up_proj", "model.layers.10.mlp.up_proj"),
        ("gate", "model.layers.1.block_sparse_moe.gate", "model.layers.1.mlp.shared_expert_gate"),
        ("model.layers.1*", "model.layers.10.mlp.up_proj", "model.layers.2.mlp.up_proj"),
        ("*.attn.*", "layers.0.attn.wq_a", "layers.0.attn_norm"),
        ("model.layers.*.self_attn", "model.layers.7.self_attn.q_proj", "model.layers.7.self_attn_norm"),
        ("re:.*shared_experts.*", "model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.experts.0.up_proj"),
        (r"re:.*mlp\.(gate|up)_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.experts.0.gate_proj"),
    ],
)
def test_entries_of_lists(entry: str, named: str, other: str) -> None:
    names = Names([entry])
    assert names.matches(named)
    assert not names.matches(other)
    assert names.unused([other]) == [entry]
    assert names.unused([other, named]) == []
