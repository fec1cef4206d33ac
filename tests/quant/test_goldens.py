"""Weights that other libraries quantized and decoded (scripts/make_quant_goldens.py), and vectors written by hand."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxmoe.checkpoint.formats.dtypes import ELEMENT_TYPES
from jaxmoe.quant import QuantizedWeight, find_quantization, match_tensors
from jaxmoe.quant.codes import FLOAT4, to_float32
from jaxmoe.quant.formats import AwqGemm, Gptq, Mxfp4Blocks, PackQuantized
from jaxmoe.quant.words import transpose_nibbles, unpack_words
from tests.support.quantized import Tensor, header, pack_awq, pack_nibbles, pack_words, whole

GOLDENS = sorted((Path(__file__).resolve().parent.parent / "goldens" / "quant").glob("*.safetensors"))


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray], dict[str, Tensor]]:
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    metadata, arrays, headers = entries.pop("__metadata__"), {}, {}
    for name, entry in entries.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data[begin:end], ELEMENT_TYPES[entry["dtype"]].dtype)
        arrays[name] = array.reshape(entry["shape"])
        headers[name] = Tensor(name, entry["dtype"], tuple(entry["shape"]))
    return metadata, arrays, headers


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_values_are_those_of_the_format_s_own_library(path: Path) -> None:
    metadata, arrays, headers = read(path)
    expected = arrays.pop("expected")
    del headers["expected"]
    found = match_tensors(headers, find_quantization(json.loads(metadata["config"])))
    (weight,) = found.weights.values()
    assert set(found.parts) == set(arrays)
    weight = weight.bind(expected.shape)
    box = whole(expected.shape)
    stored = {role: arrays[weight.stored[role].name] for role in weight.boxes(box)}
    values = weight.decode(stored, box)
    if metadata["library"].startswith("nvidia-modelopt"):
        # Its table has zero for the code of minus zero.
        values = np.where(values == 0, np.float32(0), values)
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


def test_there_are_goldens_of_every_library() -> None:
    libraries = {read(path)[0]["library"].split()[0] for path in GOLDENS}
    assert libraries == {
        "transformers",
        "compressed-tensors",
        "gptqmodel",
        "autoawq",
        "bitsandbytes",
        "nvidia-modelopt",
    }


def words(*values: int) -> np.ndarray:
    return np.array(values, np.uint32).view(np.int32)


def decode(form, arrays: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    stored = {role: header(role, array) for role, array in arrays.items()}
    weight = QuantizedWeight("weight", form, stored, None).bind(shape)
    return weight.decode(arrays, whole(shape))


@pytest.mark.parametrize(
    ("word", "awq", "packed"),
    [
        (0x76543210, [0, 4, 1, 5, 2, 6, 3, 7], range(-8, 0)),
        (0xFEDCBA98, [8, 12, 9, 13, 10, 14, 11, 15], range(8)),
    ],
)
def test_the_places_of_codes_in_a_word(word: int, awq: list[int], packed: range) -> None:
    one = np.ones((1, 8), np.float16)
    zeros = words(0x77777777).reshape(1, 1)
    gptq = {"values": words(word).reshape(1, 1).repeat(8, 1), "zero_point": zeros, "scale": one}
    # Version 1 stores zero points less one: of 0x7 they are 8.
    codes = [word >> 4 * place & 15 for place in range(8)]
    assert decode(Gptq(4), gptq, (8, 8)).tolist() == [[code - 8 for code in codes]] * 8
    assert decode(Gptq(4, None, 2), gptq, (8, 8)).tolist() == [[code - 7 for code in codes]] * 8
    arrays = {"values": words(word).reshape(1, 1), "zero_point": words(0).reshape(1, 1), "scale": one}
    assert decode(AwqGemm(None), arrays, (8, 1))[:, 0].tolist() == awq
    arrays = {"values": words(word).reshape(1, 1), "scale": np.ones((1, 1), np.float32)}
    assert decode(PackQuantized(4), arrays, (1, 8))[0].tolist() == list(packed)


def test_codes_of_eight_and_three_bits() -> None:
    arrays = {"values": words(0xFF807F00).reshape(1, 1), "scale": np.ones((1, 1), np.float32)}
    assert decode(PackQuantized(8), arrays, (1, 4))[0].tolist() == [-128, -1, 0, 127]
    arrays["values"] = words(0x88FAC688, 0xC688FAC6, 0xFAC688FA).reshape(1, 3)
    assert decode(PackQuantized(3), arrays, (1, 32))[0].tolist() == [i % 8 - 4 for i in range(32)]


def test_bytes_of_mxfp4() -> None:
    blocks = np.zeros((1, 1, 1, 16), np.uint8)
    blocks[0, 0, 0, :2] = 0xAB, 0x17
    arrays = {"values": blocks, "scale": np.full((1, 1, 1), 127, np.uint8)}
    assert decode(Mxfp4Blocks(), arrays, (1, 32, 1))[0, :4, 0].tolist() == [-1.5, -1.0, 6.0, 0.5]


def test_tables_of_small_floats() -> None:
    signed = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert FLOAT4.tolist() == [*signed, *[-value for value in signed]]
    assert np.signbit(FLOAT4[8])
    e4m3 = to_float32(np.array([0x38, 0x7E, 0x01, 0x08, 0x7F], np.uint8).view(ml_dtypes.float8_e4m3fn))
    np.testing.assert_array_equal(e4m3, [1, 448, 2.0**-9, 2.0**-6, np.nan])
    e8m0 = to_float32(np.array([0, 127, 254, 255], np.uint8).view(ml_dtypes.float8_e8m0fnu))
    np.testing.assert_array_equal(e8m0, [2.0**-127, 1, 2.0**127, np.nan])


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_unpacked_as_they_are_packed(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96))
    np.testing.assert_array_equal(unpack_words(pack_words(codes, bits), bits), codes)


def test_nibbles_are_transposed() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (8, 8))
    packed = pack_words(codes, 4)[:, 0].view(np.uint32)
    swapped = transpose_nibbles(packed.reshape(8, 1))[:, 0]
    np.testing.assert_array_equal(unpack_words(swapped.view(np.int32)[:, None], 4), codes.T)
    assert pack_awq(codes.reshape(8, 8)).shape == (8, 1)
    assert pack_nibbles(codes).shape == (8, 4)
