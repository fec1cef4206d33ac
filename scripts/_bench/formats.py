"""Weights of every quantized format: made up, timed where they are decoded, and whole checkpoints of them.

"A core's second" is a second of the thread's own time, so that other programs on the machine count for nothing.
"""

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxmoe.checkpoint.mapping import abstract_specs, written_blocks, written_form
from jaxmoe.models import find_family
from jaxmoe.quant.base import QuantFormat, bytes_of, swap_last
from jaxmoe.quant.formats import (
    AwqGemm,
    Bnb4Bit,
    BnbInt8,
    DeepSeekFp4,
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
from jaxmoe.quant.weights import QuantizedWeight

CASES = {
    "fp8_block": (Fp8Block(), {}),
    "fp8_block e8m0": (Fp8Block(), {"scale": "F8_E8M0"}),
    "fp8_tensor": (Fp8Tensor(), {}),
    "fp8_channel": (Fp8Channel(), {}),
    "fbgemm_fp8": (FbgemmFp8(), {}),
    "int_quantized": (IntQuantized(), {}),
    "pack_quantized 4 bits": (PackQuantized(4, 32), {}),
    "pack_quantized 4 bits, zero points": (PackQuantized(4, 32), {"zero_point": "I32"}),
    "pack_quantized 4 bits, order": (PackQuantized(4, 128), {"g_idx": "I32"}),
    "pack_quantized 8 bits": (PackQuantized(8, 128), {}),
    "pack_quantized 3 bits": (PackQuantized(3, 128), {}),
    "nvfp4_pack": (Nvfp4Pack(), {}),
    "mxfp4_pack": (Mxfp4Pack(), {}),
    "gptq 4 bits": (Gptq(4, 128), {}),
    "gptq 4 bits, order": (Gptq(4, 128), {"g_idx": "I32"}),
    "gptq 3 bits": (Gptq(3, 128), {}),
    "gptq 8 bits": (Gptq(8, 128), {}),
    "awq": (AwqGemm(128), {}),
    "mxfp4": (Mxfp4Blocks(), {}),
    "deepseek_fp4": (DeepSeekFp4(), {}),
    "nvfp4": (Nvfp4(), {}),
    "bnb_4bit": (Bnb4Bit(), {"state": "U8"}),
    "bnb_4bit nested": (Bnb4Bit(), {"state": "U8", "nested_scale": "F32", "nested_map": "F32"}),
    "bnb_int8": (BnbInt8(), {}),
}
DTYPES = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "BF16": ml_dtypes.bfloat16,
    "F16": np.float16,
    "F32": np.float32,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
}


class Stored(NamedTuple):
    """A tensor of a made-up weight."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]


def make_weight(
    form: QuantFormat, more: Mapping[str, str], shape: tuple[int, ...]
) -> tuple[QuantizedWeight, dict[str, np.ndarray]]:
    """A weight of a format with random codes, and the arrays of its parts by role.

    Args:
        form: format.
        more: parts that not every weight has, and parts of another element type than the usual one: {role: type}.
        shape: shape of the matrices, [..., N, K].
    """
    rng = np.random.default_rng(0)
    stored, arrays = {}, {}
    for part in form.parts:
        if not part.decoded or not (part.required or part.role in more):
            continue
        dtype = more.get(part.role) or part.dtypes[0]
        if part.role == "scale" and "nested_scale" in more:
            dtype = "U8"
        shapes = form.shapes(part.role, shape)
        if part.role == "state":
            array = np.frombuffer(b"{}", np.uint8)
        elif part.role == "g_idx":
            array = rng.permutation(shape[1]).astype(np.int32) // form.group_size
        elif DTYPES[dtype] in (np.float32, np.float16, ml_dtypes.bfloat16):
            array = rng.uniform(0.5, 1, shapes[0]).astype(DTYPES[dtype])
        else:
            # Bytes below 120 are neither NaN as float8 nor as an exponent, and as an exponent not too large.
            size = np.dtype(DTYPES[dtype]).itemsize
            array = rng.integers(1, 120, (*shapes[0][:-1], shapes[0][-1] * size), dtype=np.uint8).view(DTYPES[dtype])
        stored[part.role] = Stored(part.role, dtype, array.shape)
        arrays[part.role] = array
    plain = (*shape[:-2], shape[-1], shape[-2]) if form.transposed else shape
    return QuantizedWeight("weight", form, stored, None).bind(plain), arrays


def decode_rate(weight: QuantizedWeight, arrays: Mapping[str, np.ndarray], dtype: Any, seconds: float) -> float:
    """Bytes of output in a core's second: of the fastest of several runs, into an array that is there already."""
    box = tuple((0, size) for size in weight.shape)
    out = np.empty(weight.shape, dtype)
    # What is read is copied where the loader has it: the layout of `out` is that of the matrices.
    if weight.format.transposed:
        out = np.empty(weight.shape[::-1], dtype).T
    fastest, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until or math.isinf(fastest):
        begin = time.thread_time()
        weight.decode(arrays, box, out=out)
        fastest = min(fastest, time.thread_time() - begin)
    return out.nbytes / fastest


# --- checkpoints

# Widths of Qwen3-30B-A3B and gpt-oss-20b, with fewer experts, layers and words than theirs.
_COMMON = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 4096}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 32,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "bfloat16",
        **_COMMON,
    },
    "gpt_oss": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000,
        "sliding_window": 128,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **_COMMON,
    },
}


# Settings of formats that tensors do not tell from others.
SETTINGS = {
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["self_attn", "mlp.gate", "lm_head"]}
}


class _Tensor(NamedTuple):
    """A tensor to write; its values are random where there is no array."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]
    array: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype_name, self.shape)


def write_checkpoint(
    directory: Path,
    case: str,
    nbytes: int = 0,
    *,
    plain: bool = False,
    layers: int | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> int:
    """Write a checkpoint of about so many bytes, one file a layer.

    Args:
        directory: directory that is there, and empty.
        case: name in `CASES` of the format of its experts.
        nbytes: size to come near to, in whole layers.
        plain: whether the experts are in bfloat16 instead, in a model of the same family.
        layers: number of layers, whatever its size.
        sizes: entries of Qwen3-MoE's config.json to take instead of those in `MODELS`, of whatever format.

    Returns:
        Bytes of its tensors.
    """
    form, more = (None, {}) if plain else CASES[case]
    config = {**MODELS["gpt_oss" if case == "mxfp4" and sizes is None else "qwen3_moe"], **(sizes or {})}
    one_layer = sum(tensor.nbytes for tensor in _tensors({**config, "num_hidden_layers": 1}, form, more))
    config["num_hidden_layers"] = layers or max(1, round(nbytes / one_layer))
    if form is not None and form.name in SETTINGS:
        config["quantization_config"] = SETTINGS[form.name]
    (directory / "config.json").write_text(json.dumps(config))
    pool = np.random.default_rng(0).standard_normal(1 << 24, np.float32).astype(ml_dtypes.bfloat16).view(np.uint8)
    files: dict[str, list[_Tensor]] = {}
    for tensor in _tensors(config, form, more):
        layer = re.search(r"\.layers\.(\d+)\.", tensor.name)
        files.setdefault(f"model-{layer[1] if layer else 'ends'}.safetensors", []).append(tensor)
    for file, tensors in files.items():
        _write_file(directory / file, tensors, pool)
    weight_map = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(tensor.nbytes for tensors in files.values() for tensor in tensors)


def _tensors(config: Mapping[str, Any], form: QuantFormat | None, more: Mapping[str, str]) -> Iterator[_Tensor]:
    """The tensors of a model whose experts are in a format."""
    family, config = find_family(config)
    made: dict[tuple[int, ...], tuple[QuantizedWeight, dict[str, np.ndarray]]] = {}
    blocks = written_blocks(abstract_specs(family.read_config(config)), family, written_form(family, "per_expert"))
    for name, shape in {block.tensor: block.tensor_shape for block in blocks if block.tensor is not None}.items():
        if form is None or ".experts." not in name or name.endswith("bias"):
            yield _Tensor(name, "BF16", shape)
            continue
        matrices = swap_last(shape) if form.transposed else shape
        if shape not in made:
            made[shape] = make_weight(form, more, matrices)
        weight, arrays = made[shape]
        for part in form.parts:
            if part.role in arrays:
                header = weight.stored[part.role]
                yield _Tensor(part.names(name)[0], header.dtype_name, header.shape, arrays[part.role])


def _write_file(path: Path, tensors: Sequence[_Tensor], pool: np.ndarray) -> None:
    header, end = {}, 0
    for tensor in tensors:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype_name, "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            if tensor.array is not None:
                out.write(np.ascontiguousarray(tensor.array).view(np.uint8).data)
                continue
            for start in range(0, tensor.nbytes, pool.size):
                out.write(pool[: min(pool.size, tensor.nbytes - start)].data)
