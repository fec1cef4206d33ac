#!/usr/bin/env python3
"""Write tests/goldens/quant: weights that other libraries quantized, each with the values that they decode it to.

Usage: scripts/make_quant_goldens.py [DIR]

Needs torch, transformers, compressed-tensors, gptqmodel, autoawq, bitsandbytes and nvidia-modelopt, which run on a CPU; an
environment of its own is best, for they ask for versions of one another. A file has the tensors of one linear layer by
their published names, "expected" in float32, and the settings of its checkpoint as metadata.
"""

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODULE = "model.layers.0.mlp.experts.0.up_proj"
STACK = "model.layers.0.mlp.experts.gate_up_proj"
N, K = 32, 96


def write(
    folder: Path, name: str, library: str, tensors: dict, expected: torch.Tensor, config: dict, prefix: str
) -> None:
    """One file; names of tensors are put after `prefix`."""
    assert expected.dtype == torch.float32
    stored = {prefix + end: tensor.detach().clone().contiguous() for end, tensor in tensors.items()}
    metadata = {"library": f"{library} {version(library)}", "config": json.dumps(config)}
    save_file(stored | {"expected": expected.detach().clone().contiguous()}, folder / f"{name}.safetensors", metadata)
    print(name, metadata["library"])


def transformers_cases(folder: Path) -> None:
    """Block fp8 in both kinds of scales, DeepSeek-V4's experts, and gpt-oss."""
    from transformers.integrations import mxfp4
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    decode = Fp8Dequantize(None)._dequantize_one
    values = torch.randn(N, K).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3) + 0.1
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 32], "fmt": "e4m3"}}
    tensors = {".weight": values, ".weight_scale_inv": scale}
    write(folder, "fp8_block", "transformers", tensors, decode(values, scale, torch.float32), config, MODULE)
    powers = torch.randint(110, 130, (2, 3), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    tensors = {".weight": values, ".weight_scale_inv": powers}
    write(folder, "fp8_block_ue8m0", "transformers", tensors, decode(values, powers, torch.float32), config, MODULE)
    packed = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
    powers = torch.randint(110, 130, (N, K // 32), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    tensors, config = {".weight": packed, ".scale": powers}, config | {"expert_dtype": "fp4"}
    write(folder, "deepseek_fp4", "transformers", tensors, decode(packed, powers, torch.float32), config, MODULE)
    blocks = torch.randint(0, 256, (2, N, K // 32, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, N, K // 32), dtype=torch.uint8)
    expected = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    write(folder, "mxfp4", "transformers", {"_blocks": blocks, "_scales": scales}, expected, config, STACK)


def compressed_tensors_cases(folder: Path) -> None:
    """Packed, 8-bit and 4-bit float formats of compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    group, channel = {"strategy": "group", "group_size": 32}, {"strategy": "channel"}
    cases = {
        "pack": ("pack-quantized", {"num_bits": 4, "type": "int", **group}),
        "pack_zero_points": ("pack-quantized", {"num_bits": 4, "type": "int", "symmetric": False, **group}),
        "pack_channel_8": ("pack-quantized", {"num_bits": 8, "type": "int", "symmetric": False, **channel}),
        "pack_3": ("pack-quantized", {"num_bits": 3, "type": "int", **group}),
        "int8_channel": ("int-quantized", {"num_bits": 8, "type": "int", **channel}),
        "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", **channel}),
        "fp8_blocks": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
        ),
        "nvfp4_pack": (
            "nvfp4-pack-quantized",
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
        ),
        "mxfp4_pack": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", **group, "scale_dtype": torch.uint8}),
    }
    for name, (form, settings) in cases.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
        compressor = BaseCompressor.get_value_from_registry(form)
        state = {"weight": torch.randn(N, K)}
        if form == "nvfp4-pack-quantized":
            state["weight_global_scale"] = torch.tensor([448 * 6 / state["weight"].abs().max()])
            amax = state["weight"].reshape(N, -1, 16).abs().amax(-1)
            # As the quantizer has it: scales that float8 holds.
            scale = (amax / 6 * state["weight_global_scale"]).to(torch.float8_e4m3fn)
            state["weight_scale"] = scale.to(torch.float32)
        elif form == "mxfp4-pack-quantized":
            state["weight_scale"] = torch.exp2(torch.randint(-3, 3, (N, K // 32)).float())
        else:
            shape = {"tensor": (1,), "channel": (N, 1), "block": (2, 3)}.get(settings["strategy"], (N, K // 32))
            state["weight_scale"] = (
                torch.rand(shape) * 0.01 + 0.02 if settings["num_bits"] == 8 else torch.rand(shape) / 4 + 0.2
            )
            if settings.get("symmetric") is False:
                state["weight_zero_point"] = torch.randint(-7, 7, shape, dtype=torch.int8)
        packed = compressor.compress(dict(state), scheme)
        expected = decompress(compressor, packed, scheme)
        stored = {f".{key}": value for key, value in packed.items()}
        settings = {key: str(value) if isinstance(value, torch.dtype) else value for key, value in settings.items()}
        block = {"quant_method": "compressed-tensors", "format": form}
        block["config_groups"] = {"group_0": {"weights": settings, "targets": ["Linear"]}}
        write(folder, name, "compressed-tensors", stored, expected, {"quantization_config": block}, MODULE)


def decompress(compressor: Any, packed: dict, scheme: Any) -> torch.Tensor:
    """The values in float32, where the library itself rounds 4-bit floats to bfloat16 at the end."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    if scheme.weights.num_bits != 4 or scheme.weights.type != "float":
        return compressor.decompress(dict(packed), scheme)["weight"].to(torch.float32)
    return dequantize(
        x_q=unpack_fp4_from_uint8(packed["weight_packed"], N, K, dtype=torch.float32),
        scale=compressor._decompress_scale(packed["weight_scale"], torch.float32),
        args=scheme.weights,
        global_scale=packed.get("weight_global_scale"),
        dtype=torch.float32,
    )


def gptq_cases(folder: Path) -> None:
    """GPTQ of 2, 3, 4 and 8 bits, of both versions, and with inputs of any group."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    for bits, v1, order in (
        (4, True, False),
        (4, True, True),
        (4, False, True),
        (2, True, False),
        (3, True, True),
        (8, True, False),
    ):
        layer = TorchLinear(bits, 32, sym=False, desc_act=order, in_features=K, out_features=N, register_buffers=True)
        layer.qweight.random_(-(2**31), 2**31 - 1)
        # A zero point that is stored as the largest code has no place in the next word's field: version 1 takes one off.
        zeros = torch.randint(0, 2**bits - 1, (K // 32, N))
        layer.qzeros.copy_(pack_along(zeros, bits))
        layer.scales = (torch.rand(K // 32, N) * 0.1 + 0.01).to(torch.float16)
        layer.g_idx.copy_(torch.arange(K)[torch.randperm(K)] // 32 if order else torch.arange(K) // 32)
        stored = {f".{key}": getattr(layer, key).clone() for key in ("qweight", "qzeros", "scales", "g_idx")}
        if v1:
            convert_gptq_v1_to_v2_format_module(layer, bits, torch.int32)
        # In float32: what its codes and scales are made of is exact there.
        layer.scales = layer.scales.float()
        expected = layer.dequantize_weight().T.float()
        block = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": order}
        block["checkpoint_format"] = "gptq" if v1 else "gptq_v2"
        name = f"gptq_{bits}{'' if v1 else '_v2'}{'_order' if order else ''}"
        write(folder, name, "gptqmodel", stored, expected, {"quantization_config": block}, MODULE)


def pack_along(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [G, N] as int32 words along N, lowest bits first."""
    words = torch.zeros(codes.shape[0], codes.shape[1] * bits // 32, dtype=torch.int64)
    for column in range(codes.shape[1]):
        for bit in range(bits):
            place = column * bits + bit
            words[:, place // 32] |= ((codes[:, column] >> bit) & 1) << (place % 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def awq_cases(folder: Path) -> None:
    """AWQ in its GEMM layout."""
    # The file alone: the package asks for more than it needs.
    origin = Path(importlib.util.find_spec("awq").submodule_search_locations[0]) / "utils" / "packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", origin)
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    words = torch.randint(-(2**31), 2**31 - 1, (K, N // 8), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31 - 1, (K // 32, N // 8), dtype=torch.int32)
    scales = (torch.rand(K // 32, N) * 0.1 + 0.01).to(torch.float16)
    expected = packing.dequantize_gemm(words, zeros, scales.float(), 4, 32).T
    block = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    stored = {".qweight": words, ".qzeros": zeros, ".scales": scales}
    write(folder, "awq", "autoawq", stored, expected, {"quantization_config": block}, MODULE)


def bitsandbytes_cases(folder: Path) -> None:
    """4 bits of both kinds, with and without double quantization, and 8-bit integers."""
    from bitsandbytes import functional

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            # Rows of whole blocks, for its kernel for CPUs begins a block with each row; and more than one nested block.
            weight = torch.randn(130 if nested else 8, 128)
            packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested, blocksize=64)
            expected = functional.dequantize_4bit(packed, state).float()
            stored = {".weight": packed} | {
                f".weight.{key}": value for key, value in state.as_dict(packed=True).items()
            }
            block = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
            name = f"bnb_{kind}{'_nested' if nested else ''}"
            write(folder, name, "bitsandbytes", stored, expected, {"quantization_config": block}, MODULE)
    codes, largest = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.5
    expected = functional.int8_vectorwise_dequant(codes, largest)
    block = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    stored = {".weight": codes, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    write(folder, "bnb_int8", "bitsandbytes", stored, expected, {"quantization_config": block}, MODULE)


def modelopt_cases(folder: Path) -> None:
    """ModelOpt's NVFP4."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    made, scale, double = NVFP4QTensor.quantize(torch.randn(N, K), 16)
    expected = made.dequantize(torch.float32, scale=scale, double_scale=double, block_sizes={-1: 16})
    stored = {".weight": made._quantized_data, ".weight_scale": scale, ".weight_scale_2": double}
    block = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}
    write(folder, "nvfp4", "nvidia-modelopt", stored, expected, {"quantization_config": block}, MODULE)


def main() -> None:
    """All of them, from one seed."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "tests/goldens/quant")
    folder.mkdir(parents=True, exist_ok=True)
    for cases in (
        transformers_cases,
        compressed_tensors_cases,
        gptq_cases,
        awq_cases,
        bitsandbytes_cases,
        modelopt_cases,
    ):
        torch.manual_seed(0)
        cases(folder)


if __name__ == "__main__":
    main()
