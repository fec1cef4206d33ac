"""Activations that are rounded as a checkpoint asks: logits by numpy, on every mesh, and what moves along with weights."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxmoe
from jaxmoe.checkpoint.inspection import summarize
from jaxmoe.layers import packings_of, params_by_path
from tests.support import runs
from tests.support.loading import planned_weights
from tests.support.meshes import mesh_of
from tests.support.quantized_checkpoints import CASES as QUANTIZED
from tests.support.quantized_checkpoints import write_pair
from tests.support.rounding import CASES, reference_logits, write_rounding
from tests.support.saved import read_all

TOKENS = np.arange(24).reshape(6, 4) * 7 % 97
MESHES = [((2, 2, 2), "round_robin"), ((1, 4, 2), "linear")]


def errors(found, expected) -> np.ndarray:
    """The largest difference in the logits of each token."""
    return np.abs(np.asarray(found) - expected).max(-1).reshape(-1) / np.abs(expected).max()


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{form}" for family, *_, form in CASES])
def case(request, tmp_path_factory):
    family, weights, block, form = request.param
    return *write_rounding(tmp_path_factory.mktemp("rounding"), family, weights, block), form


@pytest.mark.covering(most=2)
def test_logits_are_those_of_plain_weights_and_rounded_inputs(case) -> None:
    """A scale of a row or block is that of all devices which share it, and a static one that of the weight."""
    quantized, plain, form = case
    expected = reference_logits(quantized, plain, form, TOKENS)
    for shape, placement in MESHES if runs.full else MESHES[:1]:
        load = {"mesh": mesh_of(*shape), "placement": placement, "dtype": "float32"}
        model = jaxmoe.load(quantized, **load, activations="checkpoint")
        assert {packing.activations for packing in packings_of(model).values()} == {form}
        found = errors(model(TOKENS), expected)
        # A number that lies between two of its form may go either way, and takes its sequence along.
        assert np.median(found) < 2e-5, (shape, found)
        assert np.mean(found) < 2e-2, (shape, found)
    as_they_are = jaxmoe.load(quantized, **load)
    if runs.full:
        assert np.median(errors(as_they_are(TOKENS), expected)) > 1e-3
    assert not any(packing.activations for packing in packings_of(as_they_are).values())


def input_scales(model) -> dict[str, np.ndarray]:
    return {
        path: np.asarray(param.get_value())
        for path, param in params_by_path(model).items()
        if path.endswith("_input_scale")
    }


@pytest.mark.full
def test_static_scales_go_wherever_weights_go(tmp_path) -> None:
    """Rebalance, a logical state, another mesh, the loss of devices, a plan and a save."""
    family, weights, block, _ = CASES[0]
    quantized, _ = write_rounding(tmp_path, family, weights, block)
    stored = read_all(quantized)
    names = [name for name in stored if name.endswith(".input_scale")]
    load = {"dtype": "float32", "activations": "checkpoint"}
    model = jaxmoe.load(quantized, mesh=mesh_of(1, 2, 2), **load)
    assert not model.load_report.ignored
    before = input_scales(model)
    expert = "model.layers.1.block_sparse_moe.experts.{}.{}.input_scale"
    for slot, number in enumerate(model.placements[1].slot_to_expert.tolist()):
        found = [*before["layers.1.moe.w_gate_up_input_scale"][slot], before["layers.1.moe.w_down_input_scale"][slot]]
        own = [stored[expert.format(number, name)] for name in ("w1", "w3", "w2")] if number >= 0 else [0, 0, 0]
        assert found == own
    assert before["layers.0.attention.w_o_input_scale"] == stored["model.layers.0.self_attn.o_proj.input_scale"]

    plan = jaxmoe.plan(quantized, tp=2, ep=2, **load)
    assert planned_weights(plan) == [*model.load_report.bytes_per_device.values()]
    assert plan.held == model.load_report.held
    (tmp_path / "config").mkdir()
    shutil.copy(quantized / "config.json", tmp_path / "config")
    told = jaxmoe.plan(tmp_path / "config", tp=2, ep=2, **load)
    assert told.held["routed experts"] == plan.held["routed experts"]
    np.testing.assert_array_equal(told.parts["routed experts"], plan.parts["routed experts"])
    assert plan.stored.activations == {"fp8 with the scales of the checkpoint": ("attention", "routed experts")}

    jaxmoe.rebalance(model, "round_robin")
    there = jaxmoe.load(quantized, mesh=mesh_of(1, 2, 2), placement="round_robin", **load)
    jax.tree.map(np.testing.assert_array_equal, input_scales(model), input_scales(there))
    fresh = jaxmoe.load(quantized, mesh=mesh_of(1, 2, 2), **load)
    jaxmoe.load_logical_state(fresh, jaxmoe.logical_state(there))
    jax.tree.map(np.testing.assert_array_equal, input_scales(fresh), before)

    for shape, lost in (((1, 1, 4), []), ((1, 1, 2), jax.devices()[2:4])):
        model = jaxmoe.move(model, mesh=mesh_of(*shape), lost_devices=lost)
        there = jaxmoe.load(quantized, mesh=mesh_of(*shape), **load)
        jax.tree.map(np.testing.assert_array_equal, input_scales(model), input_scales(there))
        assert packings_of(model) == packings_of(there)

    of = "(attention, routed experts)"
    lost = f"static scales of activations {of} are not written: "
    assert jaxmoe.save(model, tmp_path / "decoded").notes == (
        f"quantized weights {of} are written as plain numbers; quantize= writes quantized ones",
        lost + "a plain checkpoint has none",
    )
    [note] = jaxmoe.save(model, tmp_path / "integers", quantize="int8").notes
    assert note.startswith(lost + 'quantize="fp8_block" alone writes them')
    assert jaxmoe.convert(quantized, tmp_path / "converted", quantize="int8").notes == (
        f"{len(names)} tensors are not written, scales that no weight depends on, such as {names[0]}",
    )
    report = jaxmoe.save(model, tmp_path / "saved", quantize="fp8_block")
    assert not report.notes
    saved = read_all(tmp_path / "saved")
    scales = {name: array for name, array in saved.items() if name.endswith(".input_scale")}
    assert report.input_scales == len(scales) == len(names)
    assert all(stored[name] == scale for name, scale in scales.items())
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["activation_scheme"] == "static"
    there = jaxmoe.load(tmp_path / "saved", mesh=mesh_of(1, 1, 2), **load)
    jax.tree.map(np.testing.assert_array_equal, input_scales(there), input_scales(model))


def change(directory, tensors=None, **settings) -> None:
    """Change a checkpoint's tensors, None for one to take away, and settings."""
    found = read_all(directory) | (tensors or {})
    save_file({name: array for name, array in found.items() if array is not None}, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= settings
    (directory / "config.json").write_text(json.dumps(config))


def test_what_is_asked_for_and_what_is_in_effect_is_told(tmp_path) -> None:
    family, weights, block, _ = CASES[0]
    quantized, _ = write_rounding(tmp_path, family, weights, block)
    change(quantized, {"model.layers.0.self_attn.o_proj.input_scale": None})
    mesh = mesh_of(1, 1, 1)
    asked = {"fp8 with the scales of the checkpoint": ("attention", "routed experts")}
    kept = jaxmoe.load(quantized, mesh=mesh, dtype="float32")
    model = jaxmoe.load(quantized, mesh=mesh, dtype="float32", activations="checkpoint")
    assert kept.load_report.activations == model.load_report.activations == asked
    words = "the checkpoint asks for activations in fp8 with the scales of the checkpoint (attention, routed experts): those"
    assert f"{words} stay as they are" in kept.load_report.describe()
    assert f"{words} of attention, routed experts are rounded to it" in model.load_report.describe()
    assert (
        "1 parameters multiply with activations as they are (layers.*.attention.w_o): the checkpoint asks for fp8 with the"
        in (model.load_report.describe())
    )
    assert (
        "routed experts as float8_e4m3fn, float32 scales of whole matrices, inputs in fp8 with the scales of the"
        in (model.describe())
    )
    assert "inputs in" not in kept.describe()
    held = summarize(quantized).held
    assert held[-1].startswith(
        "asks for activations in fp8 with the scales of the checkpoint (attention, routed experts), which"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": "fp8_token"}, r'activations is "checkpoint", .*or None; got .fp8_token.'),
        ({"quantized": "dequantize"}, r'activations="checkpoint" rounds .*, and quantized="dequantize" leaves none'),
        ({"quantize": "int8"}, r"and quantize leaves none; leave one of the two out"),
        ({"adapter": "adapter"}, r"and an adapter leaves none"),
    ],
)
def test_arguments_that_contradict_are_refused(arguments, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        jaxmoe.load(tmp_path, mesh=mesh_of(1, 1, 1), **{"activations": "checkpoint"} | arguments)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (5, r"would round the inputs of no weight: its settings ask for no form of activations; leave"),
        (
            13,
            r"of no weight: the checkpoint asks for 4-bit floats in groups of 16, .*, a form that no kernel rounds to",
        ),
    ],
)
def test_nothing_to_round_is_refused_before_weights_are_read(index, message, tmp_path, monkeypatch) -> None:
    family, weights, block = QUANTIZED[index]
    quantized, _, _ = write_pair(tmp_path, family, weights, block)
    monkeypatch.setattr(
        "jaxmoe.checkpoint.loading.execute.load_shards", lambda *args, **options: pytest.fail("weights are read")
    )
    with pytest.raises(ValueError, match=message):
        jaxmoe.load(quantized, mesh=mesh_of(1, 1, 1), activations="checkpoint")


@pytest.mark.parametrize("value", [0, np.nan, -1])
def test_broken_scales_are_refused_where_they_are_read(value, tmp_path) -> None:
    family, weights, block, _ = CASES[0]
    quantized, _ = write_rounding(tmp_path, family, weights, block)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.input_scale"
    change(quantized, {name: np.array(value, np.float32)})
    mesh = mesh_of(1, 1, 1)
    with pytest.raises(ValueError, match=rf"'{name}' must hold scales that are finite and above zero; it has others"):
        jaxmoe.load(quantized, mesh=mesh, activations="checkpoint")
    jaxmoe.load(quantized, mesh=mesh)
