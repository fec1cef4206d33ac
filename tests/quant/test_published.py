"""What the settings of published checkpoints say of experts, attention and head: short blocks with their peculiarities.

Each block has the entries of the published one that decide, with lists cut to a layer or two; what is expected was
written by hand from reading the published files.
"""

from typing import Any

import pytest

from jaxmoe.quant import find_quantization

BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "producer": {"name": "modelopt", "version": "0.44.0"}}
NVFP4_GROUP = {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
CACHE = {"dynamic": False, "num_bits": 8, "type": "float"}


def config(**block: Any) -> dict[str, Any]:
    return {"quantization_config": block}


def side(**block: Any) -> dict[str, Any]:
    """hf_quant_config.json alone."""
    return {"hf": {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": block}}


def compressed(form: str, weights: dict[str, Any], ignore: list[str]) -> dict[str, Any]:
    """A block inside of text_config, as Kimi's are."""
    group = {"weights": {"dynamic": False, "symmetric": True, "strategy": "group", **weights}, "targets": ["Linear"]}
    block = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }
    return {"text_config": {"quantization_config": block | {"kv_cache_scheme": None}}}


GLM_IGNORED = ["lm_head", "model.embed_tokens", "model.layers.3.mlp.gate", "model.layers.3.self_attn.indexers_proj"]
KIMI_IGNORED = ["re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
LAYERS = {
    "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
    "backbone.layers.1.mixer.experts.0.up_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
}
QWEN36_LAYERS = {
    "model.language_model.layers.3.self_attn.o_proj": {"quant_algo": "FP8"},
    "model.language_model.layers.3.mlp.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    "lm_head": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
}
FLASH_LAYERS = {"layers.3.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}}
QWEN3_IGNORED = ["lm_head", "model.layers.3.mlp.gate", "model.layers.3.input_layernorm"]

# Names of an expert, of a projection of attention and of the head.
QWEN = ("model.layers.3.mlp.experts.5.gate_proj", "model.layers.3.self_attn.o_proj", "lm_head")
MINIMAX = ("model.layers.3.block_sparse_moe.experts.5.w1", "model.layers.3.self_attn.o_proj", "lm_head")
V4 = ("layers.3.ffn.experts.5.w1", "layers.3.attn.wq_a", "head")
KIMI = (
    "language_model.model.layers.3.mlp.experts.5.gate_proj",
    "language_model.model.layers.3.self_attn.o_proj",
    "language_model.lm_head",
)
QWEN35 = (
    "model.language_model.layers.3.mlp.experts.5.gate_proj",
    "model.language_model.layers.3.self_attn.o_proj",
    "lm_head",
)
NEMOTRON = ("backbone.layers.1.mixer.experts.0.up_proj", "backbone.layers.12.mixer.q_proj", "lm_head")
GPT_OSS = ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.self_attn.o_proj", "lm_head")
FP8 = ("fp8_block", "fp8_block", None)
EXPERTS_NVFP4 = ("nvfp4", None, None)

Case = tuple[dict[str, Any], tuple[str, str, str], tuple[str | None, str | None, str | None]]
CASES: dict[str, Case] = {
    "MiniMax-M2.5": (
        config(**BLOCK, fmt="float8_e4m3fn", modules_to_not_convert=["gate", "e_score_correction_bias", "lm_head"]),
        MINIMAX,
        FP8,
    ),
    "Qwen3-30B-A3B-FP8": (config(**BLOCK, fmt="e4m3", modules_to_not_convert=QWEN3_IGNORED), QWEN, FP8),
    "MiMo-V2-Flash": (config(**BLOCK, fmt="e4m3"), QWEN, FP8),
    "DeepSeek-V3": (config(**BLOCK, fmt="e4m3"), QWEN, FP8),
    "DeepSeek-V3.2": (config(**BLOCK, fmt="e4m3", scale_fmt="ue8m0"), QWEN, FP8),
    "DeepSeek-V4-Flash": (
        config(**BLOCK, fmt="e4m3", scale_fmt="ue8m0") | {"expert_dtype": "fp4"},
        V4,
        ("deepseek_fp4", "fp8_block", None),
    ),
    "DeepSeek-V4-Pro": (
        config(**BLOCK, fmt="e4m3", scale_fmt="ue8m0") | {"expert_dtype": "fp4"},
        V4,
        ("deepseek_fp4", "fp8_block", None),
    ),
    "Kimi-K2-Instruct": (config(**BLOCK, fmt="e4m3"), QWEN, FP8),
    "Kimi-K2.5": (
        compressed("pack-quantized", {"num_bits": 4, "type": "int", "group_size": 32}, ["lm_head", *KIMI_IGNORED]),
        KIMI,
        ("pack_quantized", None, None),
    ),
    "Kimi-K3": (
        compressed(
            "mxfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"},
            [*KIMI_IGNORED, "re:.*lm_head.*", "re:.*vision_tower.*"],
        ),
        KIMI,
        ("mxfp4_pack", None, None),
    ),
    "DeepSeek-V3.1-NVFP4": (
        side(
            quant_algo="NVFP4",
            kv_cache_quant_algo="FP8",
            group_size=16,
            exclude_modules=["lm_head", "model.layers.3.self_attn.q_a_proj", "model.layers.3.self_attn.kv_b_proj"],
        ),
        QWEN,
        ("nvfp4", "nvfp4", None),
    ),
    "DeepSeek-V4-Flash-NVFP4": (
        config(
            **BLOCK,
            fmt="e4m3",
            scale_fmt="ue8m0",
            quant_algo="MIXED_PRECISION",
            moe_quant_algo="NVFP4",
            group_size=16,
            ignore=["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
            quantized_layers=FLASH_LAYERS,
        )
        | {"expert_dtype": "fp4"},
        V4,
        ("nvfp4", "fp8_block", None),
    ),
    "GLM-5-NVFP4": (
        side(
            quant_algo="NVFP4",
            kv_cache_quant_algo="FP8",
            group_size=16,
            exclude_modules=["lm_head", "model.layers.3.self_attn.indexer*", "model.layers.3.self_attn.o_proj"],
        ),
        QWEN,
        EXPERTS_NVFP4,
    ),
    "GLM-5.2-NVFP4": (
        config(
            **MODELOPT,
            config_groups={"group_0": NVFP4_GROUP},
            kv_cache_scheme=CACHE,
            ignore=["lm_head", "model.layers.0*", "model.layers.3.mlp.shared_experts*", "model.layers.3.self_attn*"],
        ),
        QWEN,
        EXPERTS_NVFP4,
    ),
    "Kimi-K2.5-NVFP4": (
        config(
            **MODELOPT,
            config_groups={"group_0": NVFP4_GROUP},
            kv_cache_scheme=CACHE,
            ignore=["language_model.lm_head", "language_model.model.layers.3.self_attn*"],
        ),
        KIMI,
        EXPERTS_NVFP4,
    ),
    "Kimi-K2.7-Code-NVFP4": (
        config(
            **MODELOPT,
            config_groups={"group_0": NVFP4_GROUP},
            kv_cache_scheme=CACHE,
            ignore=["language_model.lm_head", "language_model.model.layers.3.self_attn*", "vision_tower*"],
        ),
        KIMI,
        EXPERTS_NVFP4,
    ),
    "MiniMax-M2.7-NVFP4": (
        config(
            **MODELOPT,
            config_groups={"group_0": NVFP4_GROUP},
            kv_cache_scheme=CACHE,
            ignore=["lm_head", "model.layers.3.block_sparse_moe.gate", "model.layers.3.self_attn*"],
        ),
        MINIMAX,
        EXPERTS_NVFP4,
    ),
    "Nemotron-3-Nano-NVFP4": (
        side(
            quant_algo="NVFP4",
            kv_cache_quant_algo="FP8",
            group_size=16,
            exclude_modules=["lm_head", "backbone.layers.4.mixer.in_proj", "backbone.layers.12.mixer.q_proj"],
        ),
        NEMOTRON,
        EXPERTS_NVFP4,
    ),
    "Nemotron-3-Ultra-FP8": (
        {"hf": {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}},
        NEMOTRON,
        ("fp8_tensor", "fp8_tensor", None),
    ),
    "Nemotron-3-Ultra-NVFP4": (
        {"hf": {"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}},
        NEMOTRON,
        ("nvfp4", "nvfp4", None),
    ),
    "Nemotron-3.5-Lightning-NVFP4": (
        side(
            quant_algo="MIXED_PRECISION",
            kv_cache_quant_algo="FP8",
            quantized_layers=LAYERS,
            exclude_modules=["backbone.embeddings", "backbone.layers.1.mixer.gate", "backbone.layers.12.mixer.q_proj"],
        ),
        NEMOTRON,
        ("nvfp4", None, "nvfp4"),
    ),
    "Qwen3-235B-A22B-NVFP4": (
        side(
            quant_algo="NVFP4",
            kv_cache_quant_algo="FP8",
            group_size=16,
            exclude_modules=["model.layers.3.mlp.gate", "lm_head"],
        ),
        QWEN,
        ("nvfp4", "nvfp4", None),
    ),
    "Qwen3.5-122B-A10B-NVFP4": (
        config(
            **MODELOPT,
            config_groups={"group_0": NVFP4_GROUP},
            kv_cache_scheme=CACHE,
            ignore=[
                "lm_head",
                "model.language_model.layers.0.linear_attn*",
                "model.language_model.layers.3.self_attn*",
            ],
        ),
        QWEN35,
        EXPERTS_NVFP4,
    ),
    "Qwen3.6-35B-A3B-NVFP4": (
        config(
            **MODELOPT | {"quant_algo": "MIXED_PRECISION"},
            quantized_layers=QWEN36_LAYERS,
            ignore=["mtp.layers.0*", "mtp*"],
        ),
        QWEN35,
        ("nvfp4", "fp8_tensor", "nvfp4"),
    ),
    "gpt-oss-20b": (
        config(
            quant_method="mxfp4",
            modules_to_not_convert=["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        ),
        GPT_OSS,
        ("mxfp4", None, None),
    ),
    "sgl DeepSeek-V4-Flash-FP8": (config(**BLOCK, fmt="e4m3", scale_fmt="ue8m0"), V4, FP8),
    "sgl DeepSeek-V4-Pro-FP8": (config(**BLOCK, fmt="e4m3", scale_fmt="ue8m0"), V4, FP8),
    "GLM-5-FP8": (config(**BLOCK, fmt="e4m3", modules_to_not_convert=GLM_IGNORED), QWEN, FP8),
    "GLM-5.1-FP8": (config(**BLOCK, fmt="e4m3", modules_to_not_convert=GLM_IGNORED), QWEN, FP8),
    "Step-3.7-Flash-FP8, with no fmt": (config(**BLOCK), QWEN, FP8),
}


@pytest.mark.parametrize("name", CASES)
def test_formats_of_experts_attention_and_head(name: str) -> None:
    files, modules, expected = CASES[name]
    beside = {"hf_quant_config.json": files["hf"]} if "hf" in files else {}
    found = find_quantization(files, beside)
    assert found is not None
    assert found.source == ("hf_quant_config.json" if beside else "config.json")
    formats = [found.format_of(module) for module in modules]
    assert tuple(form and form.name for form in formats) == expected
    router = modules[0].split(".experts.")[0] + ".gate"
    assert found.format_of(router) is None
    assert found.format_of(modules[1].rsplit(".", 2)[0] + ".input_layernorm") is None
    cached = [note for note in found.notes if "kv_cache" in note]
    assert len(cached) == ("kv_cache" in str(files) and "'kv_cache_scheme': None" not in str(files))


def test_no_block_is_no_quantization() -> None:
    # As the other 18 are published, in bfloat16.
    plain = {"model_type": "qwen3_vl_moe", "text_config": {"hidden_size": 64, "dtype": "bfloat16"}}
    assert find_quantization(plain, {"hf_quant_config.json": {}}) is None
