"""Values of every format, whole and in boxes, and the parts that a box of them needs."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.quant import FORMATS, QuantizationError
from jaxmoe.quant import base as quant_base
from tests.support.quantized import EXAMPLES, Example, example, whole


def bits(array: np.ndarray) -> np.ndarray:
    """Values as their bytes, so that zeros of both signs differ."""
    return np.ascontiguousarray(array, np.float32).view(np.uint32)


def decode(one: Example, box=None, **more) -> np.ndarray:
    weight, box = one.bound(), box or whole(one.values.shape)
    return weight.decode(one.read(weight, box), box, **more)


@st.composite
def boxes(draw, shape):
    edges = [sorted(draw(st.tuples(st.integers(0, size - 1), st.integers(1, size)))) for size in shape]
    return tuple((a, b if b > a else a + 1) for a, b in edges)


def test_every_format_has_an_example() -> None:
    assert {example(name).format.name for name in EXAMPLES} == set(FORMATS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_values_are_the_formula_s(name: str) -> None:
    one = example(name)
    np.testing.assert_array_equal(bits(decode(one)), bits(one.values))


@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=8)
@given(data=st.data())
def test_a_box_is_that_part_of_the_whole(name: str, data) -> None:
    one = example(name)
    box = data.draw(boxes(one.values.shape))
    expected = one.values[tuple(slice(*edges) for edges in box)]
    np.testing.assert_array_equal(bits(decode(one, box)), bits(expected))


@pytest.mark.parametrize("name", EXAMPLES)
def test_tiles_are_joined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = example(name)
    monkeypatch.setattr(quant_base, "_TILE", 64)
    box = tuple((size // 5, size - size // 7) for size in one.values.shape)
    expected = one.values[tuple(slice(*edges) for edges in box)]
    np.testing.assert_array_equal(bits(decode(one, box)), bits(expected))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("name", ["fp8_block", "gptq", "mxfp4", "bnb_4bit, nested"])
def test_the_cast_is_the_last_step(name: str, dtype: type) -> None:
    one = example(name)
    with np.errstate(over="ignore"):
        expected = one.values.astype(dtype)
    out = np.empty(one.values.shape, dtype)
    assert decode(one, out=out) is out
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal(decode(one, dtype=dtype).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("name", EXAMPLES)
def test_shapes_that_are_stored_are_those_that_are_told(name: str) -> None:
    one = example(name)
    weight = one.bound()
    matrices = one.values.swapaxes(-1, -2).shape if one.format.transposed else one.values.shape
    stored = {role: tensor.shape for role, tensor in weight.stored.items()}
    for part in one.format.parts:
        shapes = one.format.shapes(part.role, matrices) if part.decoded else ()
        if shapes and part.role in stored:
            assert stored[part.role] in shapes
    assert one.format.shape_of(stored) in (matrices, None) or "no whole word" in name
    assert weight.problems(one.values.shape) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_whole_needs_each_decoded_tensor_once(name: str) -> None:
    one = example(name)
    weight = one.bound()
    found = weight.boxes(whole(one.values.shape))
    decoded = {part.role for part in one.format.parts if part.decoded}
    assert set(found) == decoded & set(weight.stored)
    assert all(box == whole(weight.stored[role].shape) for role, box in found.items())


def test_a_tensor_parallel_half_reads_half() -> None:
    one = example("gptq")
    weight, (N, K) = one.bound(), one.values.shape
    assert weight.boxes(((0, N // 2), (0, K)))["values"] == ((0, K // 8), (0, N // 2))
    assert weight.boxes(((0, N), (32, 64)))["scale"] == ((1, 2), (0, N))
    block = example("fp8_block").bound()
    # An edge inside a block: both sides read its scale.
    assert block.boxes(((0, 150), (0, 200)))["scale"] == ((0, 2), (0, 2))
    assert block.boxes(((150, 300), (0, 200)))["scale"] == ((1, 3), (0, 2))


@pytest.mark.parametrize("bad", [0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["fp8_block", "fp8_tensor", "pack_quantized", "gptq", "awq", "int_quantized"])
def test_scales_that_are_no_scales_are_refused(name: str, bad: float) -> None:
    one = example(name)
    weight = one.bound()
    arrays = one.read(weight, whole(one.values.shape))
    arrays["scale"].reshape(-1)[-1] = bad
    with pytest.raises(QuantizationError, match="zero; it has zeros" if bad == 0 else "finite scales; it has NaN"):
        weight.decode(arrays, whole(one.values.shape))


def test_an_exponent_of_255_is_refused() -> None:
    one = example("mxfp4")
    weight = one.bound()
    arrays = one.read(weight, whole(one.values.shape))
    arrays["scale"][1, 2, 0] = 255
    with pytest.raises(QuantizationError, match=r"down_proj_scales' must hold finite scales"):
        weight.decode(arrays, whole(one.values.shape))


@pytest.mark.parametrize(("name", "role"), [("nvfp4", "global_scale"), ("nvfp4_pack", "global_scale")])
def test_a_tensor_s_own_scale_is_no_zero(name: str, role: str) -> None:
    one = example(name)
    weight = one.bound()
    arrays = one.read(weight, whole(one.values.shape))
    arrays["scale"].view(np.uint8)[0, 0] = 0  # a group far below the others: its numbers are zeros
    assert not weight.decode(arrays, whole(one.values.shape))[0, :16].any()
    arrays[role][...] = 0
    with pytest.raises(QuantizationError, match="scales other than zero"):
        weight.decode(arrays, whole(one.values.shape))


@pytest.mark.parametrize("name", ["gptq, order", "pack_quantized, order"])
def test_groups_that_are_not_there_are_refused(name: str) -> None:
    one = example(name)
    weight = one.bound()
    arrays = one.read(weight, whole(one.values.shape))
    arrays["g_idx"][5] = 3
    with pytest.raises(QuantizationError, match="g_idx must name groups 0 to 2; it has 0 to 3"):
        weight.decode(arrays, whole(one.values.shape))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "must be JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"shape": [40, 24]}', r"says shape \[40, 24\]"),
        (b'{"shape": [24, 40], "blocksize": 128}', "says blocks of 128; shapes say 64"),
    ],
)
def test_a_quant_state_that_contradicts_the_tensors_is_refused(text: bytes, message: str) -> None:
    one = example("bnb_4bit")
    weight = one.bound()
    arrays = one.read(weight, whole(one.values.shape))
    arrays["state"] = np.frombuffer(text, np.uint8)
    with pytest.raises(QuantizationError, match=message):
        weight.decode(arrays, whole(one.values.shape))


@pytest.mark.parametrize("role", ["nested_scale", "nested_map"])
def test_codes_of_factors_need_what_decodes_them(role: str) -> None:
    one = example("bnb_4bit, nested")
    whole_weight = one.bound()
    stored = {key: header for key, header in whole_weight.stored.items() if key != role}
    weight = dataclasses.replace(whole_weight, stored=stored)
    with pytest.raises(
        QuantizationError, match="absmax is uint8, and 1 of nested_absmax and nested_quant_map are there"
    ):
        weight.decode(one.read(weight, whole(one.values.shape)), whole(one.values.shape))


def test_an_offset_of_factors_is_a_number() -> None:
    one = example("bnb_4bit, nested")
    weight = one.bound()
    arrays = one.read(weight, whole(one.values.shape))
    text = bytes(arrays["state"]).replace(b"0.0123", b'"none"')
    arrays["state"] = np.frombuffer(text, np.uint8)
    with pytest.raises(QuantizationError, match="nested_offset must be a number; it is 'none'"):
        weight.decode(arrays, whole(one.values.shape))
