"""Weights that stay packed: their arrays stand for the same values, in any box and with any finer block."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.kernels.grouped_matmul.quantized import FORMATS as KERNEL_FORMATS
from jaxmoe.quant.packing import PACKED_DTYPES, Packing
from jaxmoe.quant.unpack import unpack as unpack_on_host
from tests.support.quantized import E2M1, EXAMPLES, Example, example, whole


def packable(name: str) -> Packing | None:
    return example(name).bound().packing


PACKED = [name for name in EXAMPLES if packable(name) is not None]


def unpack(arrays: dict[str, np.ndarray], packing: Packing, block: tuple[int, int]) -> np.ndarray:
    """The formula in `Packing`, on arrays in the order of the format's matrices."""
    values = np.ascontiguousarray(arrays["values"])
    if packing.per_byte == 2:
        codes = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], -1)
        numbers = codes.astype(np.float32) if packing.format == "int4" else E2M1[codes]
    else:
        numbers = values.astype(np.float32)

    def spread(grid: np.ndarray) -> np.ndarray:
        return grid.repeat(block[0], -2).repeat(block[1], -1)

    if packing.format == "int4":
        numbers = numbers - (spread(arrays["zero_point"]).astype(np.float32) if packing.zero_points else 8)
    scale = arrays["scale"]
    power = packing.scales == "uint8"
    scales = scale.view(ml_dtypes.float8_e8m0fnu).astype(np.float32) if power else scale.astype(np.float32)
    if packing.matrix_scales:
        scales = scales * arrays["matrix_scale"]
    return numbers * spread(scales)


def read(one: Example, role: str, box, block) -> np.ndarray:
    """One array of the packed form, from exactly what it says that it needs."""
    weight = one.bound()
    parts = weight.packed_boxes(role, box)
    arrays = {
        part: np.array(one.arrays[weight.stored[part].name][tuple(slice(*edges) for edges in its)])
        for part, its in parts.items()
    }
    return weight.packed(role, arrays, box, block)


def test_alike_weights_share_what_follows_from_their_layout():
    one, other = example("gptq"), example("gptq")
    box = whole(one.values.shape)
    shared, same = one.bound(), dataclasses.replace(other.bound(), name="another")
    assert shared.packing is same.packing
    assert shared.packed_boxes("scale", box) is same.packed_boxes("scale", box)
    # Not where a part is of another type, or the format has other settings.
    stored = {**shared.stored, "scale": dataclasses.replace(shared.stored["scale"], dtype_name="BF16")}
    assert dataclasses.replace(shared, stored=stored).packing.scales == "bfloat16" != shared.packing.scales
    assert dataclasses.replace(shared, format=dataclasses.replace(shared.format, act_order=True)).packing is None


def check(one: Example, box, block: tuple[int, int]) -> None:
    weight, packing = one.bound(), one.bound().packing
    turned = weight.format.transposed
    shape = tuple(stop - start for start, stop in (box[:-2] + box[:-3:-1] if turned else box))
    arrays = {}
    for role in packing.roles:
        units = {"values": (1, packing.per_byte), "matrix_scale": shape[-2:]}.get(role, block)
        array = read(one, role, box, units)
        assert array.dtype == packing.dtype(role) or role not in ("values", "zero_point")
        arrays[role] = np.swapaxes(array, -1, -2) if turned else array
        expected = (*shape[:-2], shape[-2] // units[0], shape[-1] // units[1])
        assert arrays[role].shape == expected, role
        np.testing.assert_array_equal(arrays[role].astype(packing.dtype(role)).astype(np.float32), arrays[role])
    values = unpack(arrays, packing, block)
    expected = one.values[tuple(slice(*edges) for edges in box)]
    np.testing.assert_allclose(np.swapaxes(values, -1, -2) if turned else values, expected, rtol=2e-7, atol=0)
    if packing.matrix_scales:
        arrays["matrix_scale"] = arrays["matrix_scale"][..., 0, 0]
    ours = dataclasses.replace(packing, block=block)
    found = unpack_on_host(ours, arrays, tuple((0, size) for size in shape), shape)
    np.testing.assert_allclose(found, values, rtol=2e-7, atol=0)


def cuts(name: str) -> tuple[Example, tuple[int, int], tuple[int, ...]]:
    """An example, its block as numbers of matrices that it divides, and the shape of the matrices."""
    one = example(name)
    shape = one.values.shape
    if one.format.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    return one, one.bound().packing.units("scale", shape), shape


@pytest.mark.parametrize("name", PACKED)
def test_packed_values_are_the_decoded_ones(name: str) -> None:
    one, (N, K), shape = cuts(name)
    check(one, whole(one.values.shape), (math.gcd(N, shape[-2]), math.gcd(K, shape[-1])))


@pytest.mark.parametrize("name", PACKED)
@settings(max_examples=8)
@given(data=st.data())
def test_so_they_are_in_a_box_and_with_a_finer_block(name: str, data) -> None:
    one, native, shape = cuts(name)
    per_byte = one.bound().packing.per_byte
    box, block = [], []
    for size, of in zip(shape[-2:], native, strict=True):
        units = [d for d in range(1, of + 1) if of % d == size % d == 0 and d % (per_byte if block else 1) == 0]
        unit = data.draw(st.sampled_from(units))
        first = data.draw(st.integers(0, size // unit - 1))
        box.append((first * unit, data.draw(st.integers(first + 1, size // unit)) * unit))
        block.append(unit)
    box = box[::-1] if one.format.transposed else box
    lead = tuple((0, size) for size in shape[:-2])
    check(one, (*lead, *box), tuple(block))


def test_every_format_that_is_not_decoded_for_a_reason_stays_packed() -> None:
    kinds = {one.format.name for one in map(example, EXAMPLES)}
    packed = {example(name).format.name for name in PACKED}
    assert kinds - packed == {"bnb_4bit"}  # a table of values of its own


def test_the_kernels_have_every_packed_form() -> None:
    for name, (dtype, per_byte) in PACKED_DTYPES.items():
        form = KERNEL_FORMATS[name]
        assert (np.dtype(form.dtype), form.per_byte) == (dtype, per_byte)
    assert PACKED_DTYPES.keys() == KERNEL_FORMATS.keys()
