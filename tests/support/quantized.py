"""Quantized weights made from codes, with values by the plainest formula there is: the oracle of `jaxmoe.quant`.

`EXAMPLES` has every format at least once, and each variant of its tensors; a new format is tested by being listed.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from jaxmoe.quant import QuantFormat, QuantizedWeight
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

FLOAT8, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
NF4 = np.float32(
    "-1 -0.6961928 -0.52507305 -0.39491749 -0.28444138 -0.18477343 -0.09105004 0 "
    "0.0795803 0.1609302 0.2461123 0.33791524 0.44070983 0.562617 0.72295684 1".split()
)
DTYPE_NAMES = {
    np.dtype(FLOAT8): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(E8M0): "F8_E8M0",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    **{np.dtype(f"{kind}{bits // 8}"): f"{kind.upper()}{bits}" for kind in "iuf" for bits in (16, 32, 64)},
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A header, as the files of a checkpoint have it."""

    name: str
    dtype_name: str
    shape: tuple[int, ...]


def header(name: str, array: np.ndarray) -> Tensor:
    return Tensor(name, DTYPE_NAMES[array.dtype], array.shape)


@dataclasses.dataclass(frozen=True)
class Example:
    """Stored arrays of one weight by the name that they have on disk, and its values."""

    format: QuantFormat
    arrays: Mapping[str, np.ndarray]
    values: np.ndarray
    weight: str

    def headers(self) -> dict[str, Tensor]:
        return {name: header(name, array) for name, array in self.arrays.items()}

    def bound(self) -> QuantizedWeight:
        found = {}
        for part in self.format.parts:
            name = next((name for name in part.names(self.weight) if name in self.arrays), None)
            if name is not None:
                found[part.role] = header(name, self.arrays[name])
        return QuantizedWeight(self.weight, self.format, found, None).bind(self.values.shape)

    def read(self, weight: QuantizedWeight, box: tuple[tuple[int, int], ...]) -> dict[str, np.ndarray]:
        """Exactly what `weight.boxes` asks for, and nothing else."""
        return {
            role: np.array(self.arrays[weight.stored[role].name][tuple(slice(*edges) for edges in part)])
            for role, part in weight.boxes(box).items()
        }


def whole(shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((0, size) for size in shape)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [..., n] as a stream of bits, lowest first, in int32 words; the last word is filled with zeros."""
    stream = (codes.astype(np.uint8)[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = stream.reshape(*codes.shape[:-1], -1)
    missing = -stream.shape[-1] % 32
    stream = np.concatenate([stream, np.zeros((*stream.shape[:-1], missing), np.uint8)], axis=-1)
    return np.packbits(stream, axis=-1, bitorder="little").view("<i4")


def pack_words_apart(codes: np.ndarray, bits: int) -> np.ndarray:
    """The same with no code in two words, as older writers of compressed-tensors have it."""
    fields = 32 // bits
    filled = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] // fields) * fields), np.uint32)
    filled[..., : codes.shape[-1]] = codes
    parts = filled.reshape(*codes.shape[:-1], -1, fields) << (bits * np.arange(fields, dtype=np.uint32))
    return np.bitwise_or.reduce(parts, axis=-1).view(np.int32)


def pack_nibbles(codes: np.ndarray, *, high_first: bool = False) -> np.ndarray:
    first, second = codes[..., 0::2].astype(np.uint8), codes[..., 1::2].astype(np.uint8)
    return first << 4 | second if high_first else second << 4 | first


def pack_awq(codes: np.ndarray) -> np.ndarray:
    """Codes [K, N] as words [K, N / 8]: place i of a word has output (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, output::8].astype(np.uint32) << np.uint32(4 * place)
    return words.view(np.int32)


def repeat(grid: np.ndarray, shape: tuple[int, ...], block: tuple[int, int]) -> np.ndarray:
    """A grid with each entry repeated over its block, cut to the matrices' shape."""
    return grid.repeat(block[0], -2).repeat(block[1], -1)[..., : shape[-2], : shape[-1]]


def _scales(rng: np.random.Generator, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
    return np.asarray(rng.uniform(0.25, 2, shape) * 2.0 ** rng.integers(-6, 3, shape), dtype)


def _exponents(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    found = rng.integers(100, 140, shape, dtype=np.uint8)
    # 2^-127 is below float32's normal numbers.
    found.reshape(-1)[0] = 0
    return found


def _power(exponents: np.ndarray) -> np.ndarray:
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


def _float8(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    codes = rng.integers(0, 256, shape, dtype=np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    return codes.view(FLOAT8)


NAME = "model.layers.0.mlp.experts.3.up_proj.weight"
BASE = NAME.removesuffix(".weight")
STACK = "model.layers.0.mlp.experts.down_proj"


def _fp8_block(shape, block=(128, 128), exponents=False, suffix="_scale_inv", name=NAME, kept_dims=False):
    def make(rng):
        values = _float8(rng, shape)
        counts = tuple(-(-size // b) for size, b in zip(shape[-2:], block, strict=True))
        grid = _exponents(rng, (*shape[:-2], *counts)) if exponents else _scales(rng, (*shape[:-2], *counts))
        scale = _power(grid) if exponents else grid
        stored = grid.view(E8M0) if exponents == "e8m0" else grid
        stored = stored[:, None, :, None] if kept_dims else stored
        expected = values.astype(np.float32) * repeat(scale, shape, block)
        scale_name = name.removesuffix(".weight") + suffix if suffix.startswith(".") else name + suffix
        return Example(Fp8Block(block), {name: values, scale_name: stored}, expected, name)

    return make


def _fp8_scaled(form, shape, scale_shape, name=NAME, dtype=np.float32):
    def make(rng):
        values, scale = _float8(rng, shape), _scales(rng, scale_shape, dtype)
        seen = scale.astype(np.float32)
        if isinstance(form, Fp8Channel):
            seen = seen.reshape(*shape[:-1], 1)
        elif scale.size > 1:
            seen = seen.reshape(*shape[:-2], 1, 1)
        # A static scale of activations, which values do not depend on.
        static = name + "_input_scale" if name == STACK else BASE + ".input_scale"
        arrays = {name: values, name + "_scale": scale}
        arrays |= {} if isinstance(form, FbgemmFp8) else {static: np.asarray(3, dtype)}
        return Example(form, arrays, values.astype(np.float32) * seen, name)

    return make


def _fbgemm_stack(last):
    def make(rng):
        values, scale = _float8(rng, (3, 40, 24)), _scales(rng, (3, 1, 24))
        stored = scale.reshape(3, 24, 1) if last else scale
        arrays = {STACK: values, STACK + "_scale": stored}
        return Example(FbgemmFp8(), arrays, values.astype(np.float32) * scale, STACK)

    return make


def _int8(shape, grid_shape, group=None, zero=False):
    def make(rng):
        values = rng.integers(-128, 128, shape).astype(np.int8)
        scale = _scales(rng, grid_shape, ml_dtypes.bfloat16)
        zeros = rng.integers(-9, 9, grid_shape).astype(np.int8)
        arrays = {NAME: values, NAME + "_scale": scale} | ({NAME + "_zero_point": zeros} if zero else {})
        block = (1, group or shape[1]) if scale.size > 1 else shape
        grid, offsets = (repeat(np.atleast_2d(one.astype(np.float32)), shape, block) for one in (scale, zeros))
        expected = (values.astype(np.float32) - (offsets if zero else 0)) * grid
        return Example(IntQuantized(group), arrays, expected, NAME)

    return make


def _packed(shape, bits=4, group=32, zero=False, order=None, apart=False):
    def make(rng):
        N, K = shape
        pack = pack_words_apart if apart else pack_words
        codes, groups = rng.integers(0, 2**bits, shape), 1 if group is None else K // group
        scale, zeros = _scales(rng, (N, groups), ml_dtypes.bfloat16), rng.integers(0, 2**bits, (N, groups))
        index = np.arange(K) // (group or K)
        arrays = {
            BASE + ".weight_packed": pack(codes, bits),
            BASE + ".weight_scale": scale,
            BASE + ".weight_shape": np.array(shape, np.int64),
        }
        if zero:
            arrays[BASE + ".weight_zero_point"] = np.ascontiguousarray(pack(zeros.T, bits).T)
        if order is not None:
            index = rng.permutation(index) if order == "shuffled" else index
            stored = index if order == "shuffled" else np.full(K, -1)
            arrays[BASE + ".weight_g_idx"] = stored.astype(np.int32)
        offset = zeros[:, index] if zero else 2 ** (bits - 1)
        expected = (codes - offset).astype(np.float32) * scale.astype(np.float32)[:, index]
        return Example(PackQuantized(bits, group), arrays, expected, NAME)

    return make


def _float4(form, suffixes, group, *, shape=(24, 96), factor=None, dtype=np.uint8):
    """A packed tensor, scales of groups, and what a tensor's own scale makes of these."""

    def make(rng):
        N, K = shape
        codes = rng.integers(0, 16, (N, K))
        arrays = {BASE + suffixes[0]: pack_nibbles(codes).view(dtype)}
        if factor is None:
            exponents = _exponents(rng, (N, K // group))
            arrays[BASE + suffixes[1]] = exponents.view(E8M0) if isinstance(form, DeepSeekFp4) else exponents
            scale = _power(exponents)
        else:
            scales, whole_scale = np.abs(_float8(rng, (N, K // group)).astype(np.float32)), _scales(rng, (1,))
            scales = scales.astype(FLOAT8)
            arrays[BASE + suffixes[1]], arrays[BASE + suffixes[2]] = scales, whole_scale
            scale = factor(scales.astype(np.float32), whole_scale)
        return Example(form, arrays, E2M1[codes] * repeat(scale, (N, K), (1, group)), NAME)

    return make


def _gpt_oss(separator, flat=False, shape=(3, 24, 96)):
    def make(rng):
        E, N, K = shape
        codes, exponents = rng.integers(0, 16, (E, N, K)), _exponents(rng, (E, N, K // 32))
        packed = pack_nibbles(codes)
        arrays = {
            f"{STACK}{separator}blocks": packed if flat else packed.reshape(E, N, K // 32, 16),
            f"{STACK}{separator}scales": exponents,
        }
        matrices = E2M1[codes] * repeat(_power(exponents), (E, N, K), (1, 32))
        return Example(Mxfp4Blocks(), arrays, matrices.swapaxes(1, 2), STACK)

    return make


def _gptq(bits=4, group=32, version=1, order=None, shape=(32, 96)):
    def make(rng):
        (N, K), groups = shape, 1 if group is None else max(1, shape[1] // group)
        codes, zeros = rng.integers(0, 2**bits, (K, N)), rng.integers(0, 2**bits, (groups, N))
        scale = _scales(rng, (groups, N), np.float16)
        index = np.arange(K) // (group or K)
        arrays = {
            BASE + ".qweight": np.ascontiguousarray(pack_words(codes.T, bits).T),
            BASE + ".qzeros": pack_words((zeros - 1) % 2**bits if version == 1 else zeros, bits),
            BASE + ".scales": scale,
        }
        if order is not None:
            index = rng.permutation(index) if order == "shuffled" else index
            arrays[BASE + ".g_idx"] = index.astype(np.int32)
        expected = ((codes - zeros[index]).astype(np.float32) * scale.astype(np.float32)[index]).T
        return Example(Gptq(bits, group, version, order == "shuffled"), arrays, np.ascontiguousarray(expected), NAME)

    return make


def _awq(group=32, shape=(32, 96)):
    def make(rng):
        (N, K), groups = shape, 1 if group is None else max(1, shape[1] // group)
        codes, zeros = rng.integers(0, 16, (K, N)), rng.integers(0, 16, (groups, N))
        scale, index = _scales(rng, (groups, N), np.float16), np.arange(K) // (group or K)
        arrays = {BASE + ".qweight": pack_awq(codes), BASE + ".qzeros": pack_awq(zeros), BASE + ".scales": scale}
        expected = ((codes - zeros[index]).astype(np.float32) * scale.astype(np.float32)[index]).T
        return Example(AwqGemm(group), arrays, np.ascontiguousarray(expected), NAME)

    return make


def _nf4(shape, block=64, nested=None, storage=np.uint8):
    def make(rng):
        count = math.prod(shape)
        blocks = -(-count // block)
        codes = rng.integers(0, 16, count + count % 2)
        state = {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": list(shape)}
        arrays = {NAME: pack_nibbles(codes, high_first=True).view(storage)[:, None], NAME + ".quant_map": NF4}
        if nested is None:
            absmax = arrays[NAME + ".absmax"] = _scales(rng, (blocks,))
        else:
            coded, table = rng.integers(0, 256, blocks).astype(np.uint8), np.linspace(-1, 1, 256, dtype=np.float32)
            factors = _scales(rng, (-(-blocks // nested),))
            state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.0123}
            arrays |= {
                NAME + ".absmax": coded,
                NAME + ".nested_absmax": factors,
                NAME + ".nested_quant_map": table,
            }
            absmax = table[coded] * factors.repeat(nested)[:blocks] + np.float32(0.0123)
        text = np.frombuffer(json.dumps(state).encode(), np.uint8)
        arrays[NAME + ".quant_state.bitsandbytes__nf4"] = text
        expected = NF4[codes[:count]] * absmax.repeat(block)[:count]
        return Example(Bnb4Bit(), arrays, expected.reshape(shape), NAME)

    return make


def _llm_int8(shape):
    def make(rng):
        values, scale = rng.integers(-127, 128, shape).astype(np.int8), _scales(rng, shape[:1])
        arrays = {NAME: values, BASE + ".SCB": scale, BASE + ".weight_format": np.zeros((), np.uint8)}
        expected = values.astype(np.float32) * scale[:, None] * np.float32(7.874015718698502e-3)
        return Example(BnbInt8(), arrays, expected, NAME)

    return make


EXAMPLES: dict[str, Callable[[np.random.Generator], Example]] = {
    "fp8_block": _fp8_block((300, 200)),
    "fp8_block, one block": _fp8_block((24, 40)),
    "fp8_block, E8M0": _fp8_block((300, 200), exponents="e8m0"),
    "fp8_block, stack": _fp8_block((3, 40, 72), (16, 32)),
    "fp8_block, stack of its own name": _fp8_block((3, 40, 72), (16, 32), name=STACK),
    "fp8_block, dims kept": _fp8_block((300, 200), suffix="_scale", kept_dims=True),
    "fp8_block, MXFP8": _fp8_block((24, 96), (1, 32), exponents="bytes", suffix="_scale"),
    "fp8_tensor": _fp8_scaled(Fp8Tensor(), (24, 40), ()),
    "fp8_tensor, [1]": _fp8_scaled(Fp8Tensor(), (24, 40), (1,)),
    "fp8_tensor, stack": _fp8_scaled(Fp8Tensor(), (3, 24, 40), (3,), STACK),
    "fp8_channel": _fp8_scaled(Fp8Channel(), (24, 40), (24, 1)),
    "fp8_channel, [N]": _fp8_scaled(Fp8Channel(), (24, 40), (24,), dtype=ml_dtypes.bfloat16),
    "fp8_channel, stack": _fp8_scaled(Fp8Channel(), (3, 24, 40), (3, 24, 1), STACK),
    "fbgemm_fp8": _fp8_scaled(FbgemmFp8(), (24, 40), (24, 1)),
    "fbgemm_fp8, stack": _fbgemm_stack(last=False),
    "fbgemm_fp8, stack, scales last": _fbgemm_stack(last=True),
    "int_quantized": _int8((24, 40), (24, 1)),
    "int_quantized, tensor": _int8((24, 40), (1,)),
    "int_quantized, groups, zero points": _int8((24, 96), (24, 3), 32, zero=True),
    "pack_quantized": _packed((24, 96)),
    "pack_quantized, channel": _packed((24, 40), group=None),
    "pack_quantized, zero points": _packed((24, 96), zero=True),
    "pack_quantized, width of no whole word": _packed((20, 44), group=None, zero=True),
    "pack_quantized, order": _packed((24, 96), zero=True, order="shuffled"),
    "pack_quantized, order of -1": _packed((24, 96), order="none"),
    "pack_quantized, 8 bits": _packed((24, 96), bits=8, zero=True),
    "pack_quantized, 2 bits": _packed((24, 96), bits=2),
    "pack_quantized, 3 bits": _packed((40, 96), bits=3, zero=True),
    "pack_quantized, 3 bits apart": _packed((40, 96), bits=3, zero=True, apart=True),
    "pack_quantized, 6 bits": _packed((24, 96), bits=6),
    "nvfp4_pack": _float4(
        Nvfp4Pack(), (".weight_packed", ".weight_scale", ".weight_global_scale"), 16, factor=np.divide
    ),
    "mxfp4_pack": _float4(Mxfp4Pack(), (".weight_packed", ".weight_scale"), 32),
    "gptq": _gptq(),
    "gptq, channel": _gptq(group=None),
    "gptq, less than a group": _gptq(group=128),
    "gptq, v2": _gptq(version=2),
    "gptq, order": _gptq(order="shuffled"),
    "gptq, g_idx in order": _gptq(order="kept"),
    "gptq, 2 bits": _gptq(bits=2),
    "gptq, 3 bits": _gptq(bits=3),
    "gptq, 3 bits, v2, order": _gptq(bits=3, version=2, order="shuffled"),
    "gptq, 8 bits": _gptq(bits=8),
    "awq": _awq(),
    "awq, channel": _awq(group=None, shape=(16, 44)),
    "mxfp4": _gpt_oss("_"),
    "mxfp4, dots": _gpt_oss("."),
    "mxfp4, flat": _gpt_oss("_", flat=True),
    "deepseek_fp4": _float4(DeepSeekFp4(), (".weight", ".scale"), 32, dtype=np.int8),
    "nvfp4": _float4(Nvfp4(), (".weight", ".weight_scale", ".weight_scale_2"), 16, factor=np.multiply),
    "bnb_4bit": _nf4((24, 40)),
    "bnb_4bit, odd": _nf4((5, 13)),
    "bnb_4bit, nested": _nf4((96, 200), nested=32),
    "bnb_4bit, in bfloat16": _nf4((24, 40), storage=ml_dtypes.bfloat16),
    "bnb_int8": _llm_int8((24, 40)),
}


def example(name: str, seed: int = 0) -> Example:
    return EXAMPLES[name](np.random.default_rng(seed))


# Weights of a shape of one's own, [N, K] and for stacks of experts [E, K, N]; the blocks end inside of small shards.
OF_SHAPE: dict[str, Callable[[tuple[int, ...]], Callable[[np.random.Generator], Example]]] = {
    "fp8_block": lambda shape: _fp8_block(shape, (24, 40)),
    "fp8_block, .scale": lambda shape: _fp8_block(shape, (24, 40), exponents="e8m0", suffix=".scale"),
    "deepseek_fp4": lambda shape: _float4(DeepSeekFp4(), (".weight", ".scale"), 32, dtype=np.int8, shape=shape),
    "fp8_block, 32": lambda shape: _fp8_block(shape, (32, 32)),
    "fp8_block, 128": lambda shape: _fp8_block(shape, (128, 128)),
    "fp8_tensor": lambda shape: _fp8_scaled(Fp8Tensor(), shape, ()),
    "fp8_channel": lambda shape: _fp8_scaled(Fp8Channel(), shape, (shape[0], 1)),
    "int_quantized": lambda shape: _int8(shape, (shape[0], 1)),
    "pack_quantized": lambda shape: _packed(shape, zero=True),
    "pack_quantized, order": lambda shape: _packed(shape, zero=True, order="shuffled"),
    "nvfp4_pack": lambda shape: _float4(
        Nvfp4Pack(), (".weight_packed", ".weight_scale", ".weight_global_scale"), 16, shape=shape, factor=np.divide
    ),
    "mxfp4_pack": lambda shape: _float4(Mxfp4Pack(), (".weight_packed", ".weight_scale"), 32, shape=shape),
    "gptq": lambda shape: _gptq(shape=shape),
    "gptq, order": lambda shape: _gptq(order="shuffled", shape=shape),
    "awq": lambda shape: _awq(shape=shape),
    "mxfp4": lambda shape: _gpt_oss("_", shape=(shape[0], shape[2], shape[1])),
    "nvfp4": lambda shape: _float4(
        Nvfp4(), (".weight", ".weight_scale", ".weight_scale_2"), 16, shape=shape, factor=np.multiply
    ),
    "bnb_4bit": lambda shape: _nf4(shape, nested=32),
    "bnb_int8": _llm_int8,
}


def example_of(name: str, weight: str, shape: tuple[int, ...], rng: np.random.Generator) -> Example:
    """A weight of that format, name and shape, with random values."""
    made = OF_SHAPE[name](shape)(rng)
    base, own = weight.removesuffix(".weight"), STACK if made.weight == STACK else BASE
    arrays = {base + key.removeprefix(own): array for key, array in made.arrays.items()}
    return dataclasses.replace(made, arrays=arrays, weight=weight)
