#!/usr/bin/env python3
"""Print how fast each quantized format is decoded, in gigabytes of output a second on one core.

Usage: scripts/bench_decode.py [--format NAME ...] [--rows N] [--columns K] [--seconds S] [--json]
"""

import argparse
import json
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxmoe.quant.formats import (
    FORMATS,
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


class Stored:
    """A tensor of a made-up weight."""

    def __init__(self, name: str, dtype_name: str, shape: tuple[int, ...]) -> None:
        self.name, self.dtype_name, self.shape = name, dtype_name, shape


def make(form, more: dict[str, str], shape: tuple[int, int]):
    """A weight of a format with random codes, and its arrays."""
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
    plain = shape[::-1] if form.transposed else shape
    return QuantizedWeight("weight", form, stored, None).bind(plain), arrays


def measure(weight, arrays, dtype, seconds: float) -> float:
    """Bytes of output a second: of the fastest of several runs, into an array that is there already."""
    box = tuple((0, size) for size in weight.shape)
    out = np.empty(weight.shape, dtype)
    # What is read is copied where the loader has it: the layout of `out` is that of the matrices.
    if weight.format.transposed:
        out = np.empty(weight.shape[::-1], dtype).T
    fastest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or fastest == float("inf"):
        begin = time.perf_counter()
        weight.decode(arrays, box, out=out)
        fastest = min(fastest, time.perf_counter() - begin)
    return out.nbytes / fastest


def main() -> None:
    """Measure the formats that were asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", nargs="*", choices=sorted(FORMATS), default=sorted(FORMATS))
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each format and dtype")
    parser.add_argument("--json", action="store_true", help="one JSON object, of GB/s by case and dtype")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for name, (form, more) in CASES.items():
        if form.name not in options.format:
            continue
        weight, arrays = make(form, more, (options.rows, options.columns))
        results[name] = {
            np.dtype(dtype).name: round(measure(weight, arrays, dtype, options.seconds) / 1e9, 2)
            for dtype in (np.float32, ml_dtypes.bfloat16)
        }
        if not options.json:
            print(f"{name:36}" + "".join(f"  {dtype} {speed:5.2f} GB/s" for dtype, speed in results[name].items()))
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
