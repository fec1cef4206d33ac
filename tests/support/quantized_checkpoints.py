"""Tiny checkpoints: in quantized formats, each beside a plain one with the values that it decodes to; and plain ones."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxmoe.checkpoint.mapping import abstract_specs, written_blocks, written_form
from jaxmoe.models import find_family
from tests.support.goldens import GOLDENS
from tests.support.quantized import example_of

WIDTHS = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64}
# Widths with which groups of 32 inputs divide those of every linear layer; of Multi-head Latent Attention too.
GROUPED = {
    **WIDTHS,
    "shared_expert_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "v_head_dim": 16,
}
LINEAR = r".*\.(?:experts\.\d+|self_attn|attn|shared_experts)\.[a-z0-9_]+(?:\.|_proj\.)?weight"
# The format of the other weights, where one is of experts alone.
BESIDE = {"deepseek_fp4": "fp8_block, .scale"}
STACKS = r".*\.experts\.(?:gate_up|down)_proj"


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
    ("deepseek_v4", "deepseek_fp4", FP8 | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}),
    ("qwen3_moe", "bnb_4bit", {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ("mixtral", "bnb_int8", {"quant_method": "bitsandbytes", "load_in_8bit": True}),
]

# Formats of these that no kernel multiplies with, and that are decoded.
DECODED = {"pack_quantized, order", "gptq, order", "bnb_4bit"}


def write_pair(
    directory: Path, family: str, form: str, block: Mapping[str, Any], widths: Mapping[str, int] = WIDTHS
) -> tuple[Path, Path, int]:
    """A quantized checkpoint, one with its values, and the number of quantized weights."""
    config, shapes = _tiny(family, widths)
    rng = np.random.default_rng(0)
    stored, plain, count = {}, {}, 0
    for name, shape in shapes.items():
        fits = len(shape) > 1 and shape[-1] % 32 == 0 and shape[-2] % 32 == 0
        if fits and re.fullmatch(STACKS if form == "mxfp4" else LINEAR, name):
            kind = form if ".experts." in name else BESIDE.get(form, form)
            example = example_of(kind, name, shape, rng)
            stored |= example.arrays
            plain[name] = np.ascontiguousarray(example.values)
            count += 1
        elif name.endswith(".tid2eid"):
            stored[name] = plain[name] = np.argsort(rng.random((shape[0], 11)))[:, : shape[1]]
        else:
            stored[name] = plain[name] = rng.normal(size=shape).astype(np.float32)
    paths = directory / "quantized", directory / "plain"
    for path, tensors, more in ((paths[0], stored, {"quantization_config": block}), (paths[1], plain, {})):
        path.mkdir()
        (path / "config.json").write_text(json.dumps({**config, **more}))
        save_file(tensors, path / "model.safetensors")
    return *paths, count


def write_plain(directory: Path, family: str, dtype: type = np.float32, widths: Mapping[str, int] = GROUPED) -> Path:
    """A plain checkpoint of random weights, one tensor for each expert where the family has that."""
    config, shapes = _tiny(family, widths)
    rng = np.random.default_rng(0)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**config, "dtype": np.dtype(dtype).name}))
    tensors = {name: (rng.normal(size=shape) * 0.2).astype(dtype) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _tiny(family: str, widths: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The config of a tiny model of other widths, and the shapes of its tensors by name."""
    config = json.loads((GOLDENS / family / "original" / "config.json").read_text())
    config |= {key: size for key, size in widths.items() if key in config}
    found, config = find_family(config)
    blocks = written_blocks(abstract_specs(found.read_config(config)), found, written_form(found, "per_expert"))
    return config, {block.tensor: block.tensor_shape for block in blocks if block.tensor is not None}
