"""Encoders: every number becomes the nearest that its scale has, by decoders that know nothing of encoders."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.quant import QuantizationError
from jaxmoe.quant.encode import STACKED, TARGETS, ErrorSum
from jaxmoe.quant.encode import base as encode_base
from tests.support.quantized import E2M1, FLOAT8, NAME, STACK, Example, whole

ENCODERS = {**TARGETS, **{" ".join(key): encoder for key, encoder in STACKED.items()}}
FLOAT8_CODES = np.arange(256, dtype=np.uint8).view(FLOAT8).astype(np.float64)
# All that a scale of 1 stands for.
CODES = {
    "fp8_block": FLOAT8_CODES[np.isfinite(FLOAT8_CODES)],
    "int8": np.arange(-127.0, 128),
    "int4_group": np.arange(-7.0, 8),
    "int4_group_128": np.arange(-7.0, 8),
    "mxfp4": E2M1.astype(np.float64),
    "gpt_oss mxfp4": E2M1.astype(np.float64),
}
# (inputs that share a scale, outputs that do); None for all of them.
BLOCKS = {
    "fp8_block": (128, 128),
    "int8": (None, 1),
    "int4_group": (32, 1),
    "int4_group_128": (128, 1),
    "mxfp4": (32, 1),
    "gpt_oss mxfp4": (32, 1),
}


def example(name: str, values: np.ndarray, arrays: dict[str, np.ndarray]) -> Example:
    """What is on disk after encoding; its decoder sees headers and bytes alone."""
    form = ENCODERS[name].format
    weight = STACK if form.transposed else NAME
    stored = {part.names(weight)[0]: arrays[part.role] for part in form.parts if part.role in arrays}
    return Example(form, stored, values.swapaxes(-1, -2) if form.transposed else values, weight)


def decode(name: str, values: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    one = example(name, values, arrays)
    bound = one.bound()  # refuses other names, dtypes and shapes than a checkpoint has
    found = bound.decode(one.read(bound, whole(one.values.shape)), whole(one.values.shape))
    return found.swapaxes(-1, -2) if one.format.transposed else found


def blocks_of(name: str, values: np.ndarray):
    """Each block of a matrix, as an index."""
    columns, rows = BLOCKS[name]
    columns = columns or values.shape[1]
    for row in range(0, values.shape[0], rows):
        for column in range(0, values.shape[1], columns):
            yield np.s_[row : row + rows, column : column + columns]


@st.composite
def matrices(draw, name: str) -> np.ndarray:
    """Numbers of all sizes: of one matrix, of one block and of each number."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows = draw(st.sampled_from([1, 3, 130]))
    columns = 4 * draw(st.integers(1, 70)) if BLOCKS[name][0] is None else draw(st.integers(1, 3)) * BLOCKS[name][0]
    if name == "fp8_block":
        columns -= draw(st.integers(0, 100))
    values = rng.normal(size=(rows, columns)) * 2.0 ** draw(st.integers(-135, 110))
    spread = draw(st.sampled_from([0, 1, 12]))
    values *= 2.0 ** rng.integers(-spread, spread + 1, values.shape)
    values[rng.random(values.shape) < draw(st.sampled_from([0, 0.2, 0.99]))] = 0
    return values.astype(draw(st.sampled_from([np.float32, ml_dtypes.bfloat16])))


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=25)
@given(data=st.data())
def test_every_number_becomes_the_nearest(name: str, data) -> None:
    values = data.draw(matrices(name))
    arrays = ENCODERS[name].encode(values)
    numbers, decoded = values.astype(np.float64), decode(name, values, arrays).astype(np.float64)
    scales = arrays["scale"]
    scales = scales.view(ml_dtypes.float8_e8m0fnu) if scales.dtype == np.uint8 else scales
    for block, scale in zip(blocks_of(name, values), scales.astype(np.float64).reshape(-1), strict=True):
        steps = np.sort(CODES[name]) * scale
        place = np.clip(np.searchsorted(steps, numbers[block]), 1, len(steps) - 1)
        nearest = np.minimum(abs(numbers[block] - steps[place - 1]), abs(numbers[block] - steps[place]))
        error = abs(numbers[block] - decoded[block])
        # Values over their scale are rounded to float32 before they are to a code.
        assert (error <= nearest + 1e-6 * abs(numbers[block]) + 1e-44).all()
        largest = abs(numbers[block]).max()
        # Nothing is cut off, and no scale is larger than it needs to be, but where it would be below normal numbers.
        assert largest <= steps[-1] * (1 + 2**-8)
        least = 0.5 if "mxfp4" in name else 1 - 2**-8
        assert largest > least * steps[-1] * (1 - 1e-6) or scale <= 2.0**-126 or largest == 0


@pytest.mark.parametrize("name", ENCODERS)
@settings(max_examples=15)
@given(data=st.data())
def test_what_was_encoded_is_encoded_to_the_same(name: str, data) -> None:
    values = data.draw(matrices(name))
    arrays = ENCODERS[name].encode(values)
    decoded = decode(name, values, arrays)
    again = ENCODERS[name].encode(decoded)
    if "mxfp4" in name:
        # The same numbers may have half the scale: 3 is 6 of that.
        np.testing.assert_array_equal(decode(name, decoded, again), decoded)
    else:
        np.testing.assert_array_equal(again["values"].view(np.uint8), arrays["values"].view(np.uint8))
        ours, theirs = (found["scale"].astype(np.float32) for found in (arrays, again))
        # Where a block's numbers are below normal ones, its codes may all be zeros, and any scale is right for those.
        assert (np.isclose(theirs, ours, rtol=2**-23, atol=0) | (ours <= 2.0**-126)).all()


@pytest.mark.parametrize("name", ENCODERS)
def test_zeros_are_zeros_with_scales_that_readers_take(name: str) -> None:
    values = np.zeros((2, 128), np.float32)
    values[1, 64] = -0.0
    arrays = ENCODERS[name].encode(values)
    assert not decode(name, values, arrays).any()
    assert (arrays["scale"].astype(np.float32) != 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_not_finite_is_refused(name: str, bad: float) -> None:
    values = np.ones((3, 128), np.float32)
    values[2, 100] = bad
    with pytest.raises(QuantizationError, match="values must be finite to be quantized"):
        ENCODERS[name].encode(values)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("int4_group", (4, 48), "groups of 32 inputs must divide the 48 inputs"),
        ("int4_group", (4, 16), "groups of 32 inputs must divide the 16 inputs"),
        ("int4_group_128", (4, 64), "groups of 128 inputs must divide the 64 inputs"),
        ("int8", (4, 30), "words of 4 inputs must divide the 30 inputs"),
        ("mxfp4", (4, 33), "groups of 32 inputs must divide the 33 inputs"),
        ("fp8_block", (4,), "holds matrices; this weight has shape"),
    ],
)
def test_widths_that_a_format_has_no_room_for_are_refused(name: str, shape, message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        ENCODERS[name].encode(np.ones(shape, np.float32))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_box_of_whole_blocks_is_that_part_of_the_whole(name: str, monkeypatch) -> None:
    values = np.random.default_rng(0).normal(size=(3, 300, 256)).astype(np.float32)
    arrays = ENCODERS[name].encode(values)
    monkeypatch.setattr(encode_base, "_TILE", 5 * 256)  # tiles end elsewhere
    part = ENCODERS[name].encode(values[1:, 128:, 128:])
    if name == "int8":  # a scale is of a whole output
        part = ENCODERS[name].encode(values[1:, 128:])
        arrays = {role: array[1:, 128:] for role, array in arrays.items()}
    else:
        rows = {role: array.shape[1] * 128 // 300 for role, array in arrays.items()}
        arrays = {role: array[1:, rows[role] :, array.shape[2] // 2 :] for role, array in arrays.items()}
    for role, array in part.items():
        np.testing.assert_array_equal(array.view(np.uint8), np.ascontiguousarray(arrays[role]).view(np.uint8))


def test_scales_are_bfloat16_where_values_are() -> None:
    values = np.ones((2, 64), np.float32)
    for dtype, expected in ((ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float32"), (np.float32, "float32")):
        assert TARGETS["int8"].encode(values.astype(dtype))["scale"].dtype.name == expected


@pytest.mark.parametrize("name", ENCODERS)
def test_errors_are_those_of_the_decoded_values(name: str, monkeypatch) -> None:
    monkeypatch.setattr(encode_base, "_TILE", 5 * 256)
    values = np.random.default_rng(0).normal(size=(2, 150, 256)).astype(np.float32)
    error = ErrorSum()
    decoded = decode(name, values, ENCODERS[name].encode(values, error))
    assert error.rms == pytest.approx(np.sqrt(((decoded - values) ** 2).sum() / (values**2).sum()), rel=1e-5)
    assert error.max == pytest.approx(abs(decoded - values).max() / abs(values).max(), rel=1e-6)
    assert 0 < error.rms < 0.2


def test_no_values_are_no_error() -> None:
    error = ErrorSum()
    TARGETS["fp8_block"].encode(np.zeros((4, 64), np.float32), error)
    TARGETS["fp8_block"].encode(np.zeros((0, 64), np.float32), error)
    assert error.rms == error.max == 0
