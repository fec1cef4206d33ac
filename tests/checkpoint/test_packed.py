"""Quantized checkpoints that stay packed on the devices: the values of decoded ones, in fewer bytes, wherever they go."""

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxmoe
from jaxmoe.layers import packings_of, params_by_path
from jaxmoe.quant import QuantizedWeight
from tests.support.loading import planned_weights
from tests.support.meshes import mesh_id, mesh_of
from tests.support.quantized_checkpoints import CASES, DECODED, write_pair
from tests.support.saved import held_values, read_all

PACKED = [case for case in CASES if case[1] not in DECODED]
# One of each way in which scales lie over a matrix: by blocks, one for all, by rows, by groups with zero points, by groups
# of a stored stack, and by groups of single experts with a scale for the matrix too.
WAYS = [
    ("qwen3_moe", "fp8_block"),
    ("qwen3_moe", "fp8_tensor"),
    ("qwen3_moe", "int_quantized"),
    ("deepseek_v3", "pack_quantized"),
    ("gpt_oss", "mxfp4"),
    ("glm4_moe", "nvfp4_pack"),
]
TOKENS = [[1, 2, 3, 4, 5]]
EPS = 2e-7


@pytest.fixture(scope="module", params=PACKED, ids=[f"{family}-{form}" for family, form, _ in PACKED])
def case(request, tmp_path_factory):
    family, form, block = request.param
    return write_pair(tmp_path_factory.mktemp("packed"), family, form, block)


def assert_same_values(ours, theirs) -> None:
    found, expected = held_values(ours), held_values(theirs)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_allclose(found[path], array, rtol=EPS, err_msg=path)


def bytes_on(model) -> dict[int, int]:
    """The bytes that each device really holds."""
    total: dict[int, int] = {}
    for param in params_by_path(model).values():
        for shard in param.get_value().addressable_shards:
            total[shard.device.id] = total.get(shard.device.id, 0) + shard.data.nbytes
    return total


@pytest.mark.covering
@pytest.mark.parametrize(
    ("shape", "placement"),
    [((1, 1, 1), "linear"), ((2, 2, 2), "round_robin"), ((1, 4, 2), "linear")],
    ids=mesh_id,
)
def test_what_is_held_stands_for_the_decoded_values(case, shape, placement, tmp_path) -> None:
    quantized, _, count = case
    load = {"mesh": mesh_of(*shape), "placement": placement, "dtype": "float32"}
    kept, decoded = (jaxmoe.load(quantized, **load, quantized=how) for how in ("keep", "dequantize"))
    assert_same_values(kept, decoded)
    report = kept.load_report
    assert packings_of(kept)
    assert sum(report.packed.values()) == count - sum(report.decoded.values()) > 0
    assert report.bytes_per_device == bytes_on(kept)
    assert report.bytes_needed <= report.bytes_read < 2 * report.bytes_needed
    for device, held in report.bytes_per_device.items():
        assert held < decoded.load_report.bytes_per_device[device]

    # What a plan says, from the headers and from config.json alone.
    shutil.copy(quantized / "config.json", tmp_path)
    sizes = dict(zip(("dp", "tp", "ep"), shape, strict=True))
    plan, told = (jaxmoe.plan(path, **sizes, placement=placement, dtype="float32") for path in (quantized, tmp_path))
    assert planned_weights(plan) == [*bytes_on(kept).values()]
    # That some of its attention is plain, and that there are zero points, config.json does not say.
    packing = packings_of(kept)[f"layers.{len(kept.layers) - 1}.moe.w_down"]
    if not packing.zero_points:
        for part in ("routed experts", "padding slots"):
            np.testing.assert_array_equal(told.parts.get(part, 0), plan.parts.get(part, 0))


@pytest.mark.covering(most=1)
def test_logits_are_those_of_decoded_weights(case, request) -> None:
    quantized, _, _ = case
    shape = [(1, 1, 1), (2, 2, 2), (1, 4, 2)][request.node.callspec.indices["case"] % 3]
    kept, decoded = (
        jaxmoe.load(quantized, mesh=mesh_of(*shape), dtype="float32", quantized=how) for how in ("keep", "dequantize")
    )
    ours, theirs = np.asarray(kept(TOKENS)), np.asarray(decoded(TOKENS))
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.full
@pytest.mark.parametrize(
    "case", [case for case in PACKED if case[:2] in WAYS], ids=lambda case: "-".join(case[:2]), indirect=True
)
def test_packed_experts_go_wherever_others_go(case, tmp_path) -> None:
    """Rebalance, another mesh with other cuts, the loss of devices, a logical state and a save."""
    quantized, _, _ = case
    model = jaxmoe.load(quantized, mesh=mesh_of(1, 2, 4), dtype="float32")
    assert jaxmoe.rebalance(model, "round_robin").total > 0
    other = jaxmoe.load(quantized, mesh=mesh_of(1, 2, 4), placement="round_robin", dtype="float32")
    assert_same_values(model, other)

    state = jaxmoe.logical_state(other)
    fresh = jaxmoe.load(quantized, mesh=mesh_of(1, 2, 4), dtype="float32")
    jaxmoe.load_logical_state(fresh, state)
    assert_same_values(fresh, jaxmoe.load(quantized, mesh=mesh_of(1, 2, 4), dtype="float32", quantized="dequantize"))

    for shape, lost in (((2, 4, 1), []), ((1, 1, 4), []), ((1, 1, 2), jax.devices()[2:4])):
        model = jaxmoe.move(model, mesh=mesh_of(*shape), lost_devices=lost)
        assert (model.load_report.bytes_read > 0) == bool(lost)
        assert model.load_report.bytes_per_device == bytes_on(model)
        there = jaxmoe.load(quantized, mesh=mesh_of(*shape), dtype="float32", quantized="dequantize")
        assert_same_values(model, there)

    jaxmoe.save(model, tmp_path / "ours")
    jaxmoe.save(there, tmp_path / "theirs")
    assert "quantization_config" not in json.loads((tmp_path / "ours" / "config.json").read_text())
    ours, theirs = read_all(tmp_path / "ours"), read_all(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_allclose(ours[name], array, rtol=EPS, err_msg=name)


@pytest.mark.parametrize("form", sorted(DECODED))
def test_what_no_kernel_takes_is_decoded_and_said(form, tmp_path) -> None:
    family, _, block = next(case for case in CASES if case[1] == form)
    quantized, _, count = write_pair(tmp_path, family, form, block)
    model = jaxmoe.load(quantized, mesh=mesh_of(1, 1, 2), dtype="float32")
    assert not packings_of(model)
    assert not model.load_report.packed
    assert sum(model.load_report.decoded.values()) == count
    assert any(
        "quantized parameters are decoded" in note and "does not stay packed" in note
        for note in model.load_report.notes
    )


@pytest.mark.parametrize("width", [64, 96])
def test_a_block_that_a_device_s_part_cuts_becomes_smaller(tmp_path, width) -> None:
    """Blocks of 24 by 40 and of 32 inputs over four devices."""
    widths = {"hidden_size": 64, "moe_intermediate_size": width}
    for form, most in (("fp8_block", (24, 40)), ("mxfp4_pack", (1, 32))):
        (tmp_path / form).mkdir()
        family, _, block = next(case for case in CASES if case[:2] == ("qwen3_moe", form))
        quantized, _, _ = write_pair(tmp_path / form, family, form, block, widths)
        model = jaxmoe.load(quantized, mesh=mesh_of(1, 4, 1), dtype="float32")
        assert_same_values(
            model, jaxmoe.load(quantized, mesh=mesh_of(1, 4, 1), dtype="float32", quantized="dequantize")
        )
        # Moved there, three blocks of a device become the smaller ones of four.
        assert_same_values(
            jaxmoe.move(jaxmoe.load(quantized, mesh=mesh_of(1, 1, 1), dtype="float32"), mesh=mesh_of(1, 4, 1)), model
        )
        down = packings_of(model)["layers.0.moe.w_down"]
        assert down.block == (math.gcd(most[0], 64), math.gcd(most[1], width // 4))
        assert model.layers[0].moe.w_down_scale.shape[-1] == width // down.block[1]


def spoil(directory, end: str, change) -> str:
    """Change the last tensor whose name has an end, None to take it away; gives its name."""
    tensors = read_all(directory)
    name = [name for name in tensors if name.endswith(end)][-1]
    array = tensors.pop(name)
    if change is not None:
        tensors[name] = change(array)
    save_file(tensors, directory / "model.safetensors")
    return name


def with_last(value):
    """A change of the last number of an array, as its bytes where it has one a byte."""

    def change(array):
        array = array.copy()
        (array.view(np.uint8) if array.dtype.itemsize == 1 else array).reshape(-1)[-1] = value
        return array

    return change


BROKEN = [
    # Values of scales are seen as they are read.
    ("qwen3_moe", "fp8_block", "_scale_inv", with_last(np.nan), r"must hold finite scales; it has NaN", True),
    ("qwen3_moe", "fp8_block", "_scale_inv", with_last(0), r"must hold scales other than zero", True),
    ("deepseek_v3", "pack_quantized", "_scale", with_last(np.inf), r"must hold finite scales; it has NaN", True),
    ("gpt_oss", "mxfp4", "_scales", with_last(255), r"must hold finite scales; it has NaN", True),
    ("glm4_moe", "nvfp4_pack", "weight_scale", with_last(0x7F), r"must hold finite scales; it has NaN", True),
    ("glm4_moe", "nvfp4_pack", "_global_scale", with_last(0), r"must hold scales other than zero", True),
    # Headers tell the rest.
    ("qwen3_moe", "fp8_block", "_scale_inv", None, r"'{weight}' is in fp8_block .*, and '{name}' is missing", False),
    ("qwen3_moe", "awq", ".scales", lambda array: array[:, 8:], r"'{name}' has shape \(\d+, \d+\)", False),
    (
        "deepseek_v3",
        "nvfp4",
        "weight_scale_2",
        lambda array: array.astype(np.int32),
        r"'{name}' is I32, and nvfp4",
        False,
    ),
]


@pytest.mark.covering(most=6)
@pytest.mark.parametrize("how", ["keep", "dequantize"])
@pytest.mark.parametrize(
    "broken", BROKEN, ids=[f"{form}{end}{number}" for number, (_, form, end, *_) in enumerate(BROKEN)]
)
def test_what_is_broken_is_refused_in_a_line(broken, how, tmp_path, monkeypatch) -> None:
    family, form, end, change, message, is_read = broken
    quantized, _, _ = write_pair(tmp_path, family, form, next(case[2] for case in CASES if case[:2] == (family, form)))
    name = spoil(quantized, end, change)
    message = message.format(name=re.escape(name), weight=re.escape(name.removesuffix(end)))
    if not is_read:
        monkeypatch.setattr(
            "jaxmoe.checkpoint.loading.execute.load_shards", lambda *args, **options: pytest.fail("weights are read")
        )
    with pytest.raises(ValueError, match=message) as error:
        jaxmoe.load(quantized, mesh=mesh_of(1, 1, 2), dtype="float32", quantized=how)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_an_order_of_inputs_that_settings_deny_is_refused_where_weights_are_kept(tmp_path) -> None:
    family, form, block = next(case for case in CASES if case[1] == "gptq, order")
    quantized, plain, _ = write_pair(tmp_path, family, form, {**block, "desc_act": False})
    mesh = mesh_of(1, 1, 2)
    with pytest.raises(ValueError, match=r'g_idx must have inputs in the order.*desc_act is false.*"dequantize"'):
        jaxmoe.load(quantized, mesh=mesh, dtype="float32")
    assert_same_values(
        jaxmoe.load(quantized, mesh=mesh, dtype="float32", quantized="dequantize"),
        jaxmoe.load(plain, mesh=mesh, dtype="float32"),
    )


def test_bytes_that_are_those_of_the_file_are_read_where_they_are_to_be(tmp_path, monkeypatch) -> None:
    """Values of fp8 and of gpt-oss' MXFP4 are read as plain tensors are, their scales alone by way of the format."""
    for family, form in (("qwen3_moe", "fp8_block"), ("gpt_oss", "mxfp4"), ("deepseek_v3", "pack_quantized")):
        (tmp_path / form).mkdir()
        block = next(case[2] for case in CASES if case[:2] == (family, form))
        quantized, _, _ = write_pair(tmp_path / form, family, form, block)
        asked = set()
        packed = QuantizedWeight.packed

        def noting(self, role, *args, packed=packed, asked=asked):
            asked.add(role)
            return packed(self, role, *args)

        monkeypatch.setattr(QuantizedWeight, "packed", noting)
        jaxmoe.load(quantized, mesh=mesh_of(1, 2, 2), dtype="float32")
        monkeypatch.undo()
        assert asked in ({"scale"}, {"scale", "zero_point"})


def test_settings_that_contradict_are_refused(tmp_path) -> None:
    mesh = mesh_of(1, 1, 1)
    with pytest.raises(ValueError, match=r"quantized is \"keep\", \"dequantize\" or None; got 'packed'"):
        jaxmoe.load("demo", mesh=mesh, quantized="packed")
    with pytest.raises(ValueError, match=r"an adapter is added to plain numbers"):
        jaxmoe.load("demo", mesh=mesh, quantized="keep", adapter=tmp_path)
