"""Checkpoints of Orbax arrays: the same model as from the original, on any mesh and placement; whole, or not at all."""

import json
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxmoe
from jaxmoe.checkpoint import CheckpointError
from jaxmoe.checkpoint.inspection import check_digests, summarize
from jaxmoe.checkpoint.loading import plan_load
from jaxmoe.checkpoint.mapping import FamilyCheckpoint
from jaxmoe.checkpoint.saving import arrays, layout, orbax
from jaxmoe.layers import param_specs, params_by_path
from jaxmoe.placement import ExpertPlacement
from tests.support.goldens import GOLDENS
from tests.support.meshes import MESH_SHAPES, mesh_of
from tests.support.mtp import write_checkpoint
from tests.support.processes import ROOT, environment
from tests.support.quantized_checkpoints import CASES, write_pair
from tests.support.saved import SOURCES, assert_same_parameters, assert_same_tensors, held_values

DEMO = ROOT / "demo"
QWEN = GOLDENS / "qwen3_moe" / "original"
SMALL_CHUNKS = 20_000  # several of them in the stacks and tables of the tiny models
PLACEMENTS = ("linear", "round_robin")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", SMALL_CHUNKS)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A model in chunks, with a placement."""
    directory = tmp_path_factory.mktemp("stored") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", SMALL_CHUNKS)
        jaxmoe.convert_to_orbax(
            QWEN, directory, placement=ExpertPlacement.from_counts(np.arange(11), ep=4, num_slots=16)
        )
    return directory


# Every checkpoint that the tests have, on meshes and by placements in turn.
@pytest.mark.covering(most=6)
@pytest.mark.parametrize(
    ("source", "shape", "placement"),
    [(source, MESH_SHAPES[i % 5], PLACEMENTS[i % 2]) for i, source in enumerate(SOURCES)],
    ids=lambda value: f"{value.parent.name}-{value.name}" if isinstance(value, Path) else str(value),
)
def test_every_family_is_what_the_original_is(source, shape, placement, tmp_path) -> None:
    jaxmoe.convert_to_orbax(source, tmp_path / "out")
    ours, theirs = (jaxmoe.load(path, mesh=mesh_of(*shape), placement=placement) for path in (tmp_path / "out", source))
    assert_same_parameters(ours, theirs)
    report = ours.load_report
    assert report.bytes_read == report.bytes_needed <= theirs.load_report.bytes_read
    assert report.expert_bytes_per_device == theirs.load_report.expert_bytes_per_device


@pytest.mark.covering(most=4)
@pytest.mark.parametrize(("family", "form", "block"), CASES, ids=[f"{family}-{form}" for family, form, _ in CASES])
def test_quantized_weights_stay_as_they_are(family, form, block, tmp_path) -> None:
    """Packed on one device, so packed in the arrays; and on a mesh held in the same bits as from the original."""
    quantized, _, _ = write_pair(tmp_path, family, form, block)
    report, out = jaxmoe.convert_to_orbax(quantized, tmp_path / "out"), tmp_path / "out"
    settings = {"mesh": mesh_of(1, 2, 4), "placement": "round_robin"}
    ours, theirs = (jaxmoe.load(path, **settings) for path in (out, quantized))
    assert_same_parameters(ours, theirs)
    assert ours.load_report.held == theirs.load_report.held
    assert ours.load_report.activations == theirs.load_report.activations
    assert bool(report.packed) == bool(ours.load_report.packed)
    assert summarize(out).held[: len(report.packed) > 0] == summarize(quantized).held[: len(report.packed) > 0]
    decoded = [held_values(jaxmoe.load(path, **settings, quantized="dequantize")) for path in (out, quantized)]
    for path, array in decoded[1].items():
        np.testing.assert_allclose(decoded[0][path], array, rtol=5e-7, err_msg=path)


def test_inputs_are_rounded_as_the_original_asks(tmp_path) -> None:
    case = next(case for case in CASES if case[1] == "fp8_tensor")
    quantized, _, _ = write_pair(tmp_path, *case)
    jaxmoe.convert_to_orbax(quantized, tmp_path / "out")
    ours, theirs = (
        jaxmoe.load(path, mesh=mesh_of(2, 2, 2), activations="checkpoint") for path in (tmp_path / "out", quantized)
    )
    assert any(path.endswith("_input_scale") for path in params_by_path(ours))
    assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_half_precision_is_the_same_as_when_it_is_loaded_so(dtype, tmp_path) -> None:
    report = jaxmoe.convert_to_orbax(QWEN, tmp_path / "out", dtype=dtype)
    assert set(report.dtypes) == {"BF16", "F32"}  # routers are held in float32
    ours, theirs = (
        jaxmoe.load(tmp_path / "out", mesh=mesh_of(1, 1, 8)),
        jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 8), dtype=dtype),
    )
    assert ours.dtype == theirs.dtype
    assert_same_parameters(ours, theirs)


def test_orbax_reads_it_onto_a_mesh(stored) -> None:
    """The arrays are a checkpoint of `jaxmoe.logical_state`, to anyone who has Orbax."""
    model = jaxmoe.load(QWEN, mesh=mesh_of(1, 2, 4), placement="round_robin")
    wanted = jaxmoe.abstract_logical_state(model)
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(stored / "weights", wanted)
    for path, array in jaxmoe.logical_state(model).items():
        assert found[path].sharding.is_equivalent_to(wanted[path].sharding, array.ndim), path
        assert np.asarray(found[path]).tobytes() == np.asarray(array).tobytes(), path
    blank = jaxmoe.load(QWEN, mesh=mesh_of(2, 2, 2), placement="round_robin")
    jaxmoe.load_logical_state(blank, found)
    assert_same_parameters(blank, jaxmoe.load(QWEN, mesh=mesh_of(2, 2, 2), placement="round_robin"))


def test_a_process_reads_its_ranges_alone(stored) -> None:
    """The plan of half of the devices needs the half of the experts that they hold, and their chunks."""
    mesh = mesh_of(1, 1, 8)
    found = FamilyCheckpoint.open(stored)
    model = jaxmoe.Decoder(found.config, mesh=mesh, placement="round_robin", dtype=np.float32)
    specs = {spec.path: spec for spec in param_specs(model)}
    whole = plan_load(found.onto(specs))
    halves = [plan_load(found.onto(specs), local_devices=half) for half in (jax.devices()[:4], jax.devices()[4:])]
    experts = sum(
        tensor.nbytes for name, tensor in found.checkpoint.tensors.items() if ".moe.w_" in name and "router" not in name
    )
    beside = whole.bytes_needed - experts
    assert sum(half.bytes_needed for half in halves) == whole.bytes_needed + beside
    assert {read.tensor.name for read in halves[0].reads} != {read.tensor.name for read in halves[1].reads}


def test_the_placement_it_keeps(stored) -> None:
    model = jaxmoe.load(stored, mesh=mesh_of(1, 2, 4), placement="checkpoint")
    expected = ExpertPlacement.from_counts(np.arange(11), ep=4, num_slots=16)
    assert all(placement == expected for placement in model.placements)
    with pytest.raises(ValueError, match="keeps none; name a strategy"):
        jaxmoe.load(QWEN, mesh=mesh_of(1, 1, 8), placement="checkpoint")


def test_back_to_files_of_tensors(stored, tmp_path) -> None:
    jaxmoe.convert(stored, tmp_path / "converted")
    jaxmoe.save(jaxmoe.load(stored, mesh=mesh_of(1, 1, 8)), tmp_path / "saved")
    jaxmoe.convert(QWEN, tmp_path / "expected")
    assert_same_tensors(tmp_path / "converted", tmp_path / "expected")
    assert_same_tensors(tmp_path / "saved", tmp_path / "expected")


def test_one_chunk_at_a_time_is_in_memory(tmp_path) -> None:
    jaxmoe.convert_to_orbax(QWEN, tmp_path / "first")  # what is imported and made once
    tracemalloc.start()
    try:
        report = jaxmoe.convert_to_orbax(DEMO, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert report.largest_chunk < report.bytes_written / 100
    # What it was read from, it, and a copy; and the headers, names and blocks of all tensors.
    assert peak < 3 * report.largest_chunk + 5e6 < report.bytes_written


@pytest.mark.full
def test_layers_for_multi_token_prediction(tmp_path) -> None:
    source = write_checkpoint("deepseek_v3", tmp_path / "source")
    for mtp in (False, True):
        jaxmoe.convert_to_orbax(source, tmp_path / f"{mtp}", mtp=mtp)
    mesh = mesh_of(1, 2, 4)
    for mtp in (False, True):
        ours = jaxmoe.load(tmp_path / "True", mesh=mesh, mtp=mtp)
        assert_same_parameters(ours, jaxmoe.load(source, mesh=mesh, mtp=mtp))
        assert bool(ours.load_report.ignored) != mtp
    with pytest.raises(CheckpointError, match="converted without"):
        jaxmoe.load(tmp_path / "False", mesh=mesh, mtp=True)
    jaxmoe.save(jaxmoe.load(tmp_path / "True", mesh=mesh), tmp_path / "saved")
    jaxmoe.convert(tmp_path / "False", tmp_path / "converted")
    assert_same_tensors(tmp_path / "saved", tmp_path / "converted")


# --- interruptions

STEPS = {
    "the first chunk": (arrays.ChunkLog, "add", 0),
    "some chunks": (arrays.ChunkLog, "add", 5),
    "the next chunk": (arrays, "digest_of", 7),
    "the tree": (orbax, "write_tree", 0),
    "the side files": (orbax, "_write_side_files", 0),
    "the description": (orbax, "_describe", 0),
    "the log": (arrays.ChunkLog, "finish", 0),
    "the name": (orbax, "put_in_place", 0),
}


def refuse_what_is_there(out: Path) -> None:
    for path in (out, out.with_name("out.partial")):
        with pytest.raises((ValueError, FileNotFoundError), match="run the same jaxmoe convert again"):
            jaxmoe.load(path, mesh=mesh_of(1, 1, 8))
    assert not out.exists()
    weights = out.with_name("out.partial") / "weights"
    if not (weights / "_METADATA").exists() and weights.exists():
        with ocp.PyTreeCheckpointer() as checkpointer, pytest.raises((ValueError, FileNotFoundError)):
            checkpointer.restore(weights)


@pytest.mark.parametrize("before", STEPS)
def test_an_interrupted_conversion_is_refused_and_goes_on(before, tmp_path, monkeypatch) -> None:
    owner, name, skipped = STEPS[before]
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(name)
        if len(calls) <= skipped:
            return real(*args, **kwargs)
        if before == "some chunks":
            real(*args, **kwargs)  # the last thing that is done is to note a chunk
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            jaxmoe.convert_to_orbax(QWEN, tmp_path / "out")
    if before != "the name":  # that is all there: it lacks its name only
        refuse_what_is_there(tmp_path / "out")
    report = jaxmoe.convert_to_orbax(QWEN, tmp_path / "out")
    assert (report.bytes_kept > 0) == (before != "the first chunk")
    assert (report.bytes_kept == report.bytes_written) == ("chunk" not in before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert check_digests(tmp_path / "out").different == ()
    expected = jaxmoe.convert_to_orbax(QWEN, tmp_path / "again")
    assert report.sha256 == expected.sha256


def test_another_conversion_begins_anew(tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(orbax, "write_tree", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            jaxmoe.convert_to_orbax(QWEN, tmp_path / "out", dtype="bfloat16")
    report = jaxmoe.convert_to_orbax(QWEN, tmp_path / "out")
    assert report.bytes_kept == 0
    assert_same_parameters(*[jaxmoe.load(path, mesh=mesh_of(1, 1, 8)) for path in (tmp_path / "out", QWEN)])


def test_one_conversion_at_a_time(tmp_path) -> None:
    def other(done: int, total: int) -> None:
        with pytest.raises(BlockingIOError, match="another one is writing"):
            jaxmoe.convert_to_orbax(QWEN, tmp_path / "out")
        raise InterruptedError

    with pytest.raises(InterruptedError):
        jaxmoe.convert_to_orbax(QWEN, tmp_path / "out", progress=other)


KILLED = """
import os, signal, sys
import jaxmoe
from jaxmoe.checkpoint.saving import arrays, layout, orbax
layout.CHUNK_BYTES = {chunk}
owner = {{"ChunkLog": arrays.ChunkLog, "arrays": arrays, "orbax": orbax}}["{owner}"]
real, calls = getattr(owner, "{name}"), []
def killed(*args, **kwargs):
    calls.append(0)
    if len(calls) <= {skipped}:
        return real(*args, **kwargs)
    if "{before}" == "some chunks":
        real(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, "{name}", killed)
jaxmoe.convert_to_orbax({source!r}, {out!r})
"""


@pytest.mark.full
@pytest.mark.parametrize("before", STEPS)
def test_a_killed_conversion_is_refused_and_goes_on(before, tmp_path) -> None:
    owner, name, skipped = STEPS[before]
    names = {"owner": owner.__name__.rpartition(".")[2], "name": name, "skipped": skipped, "before": before}
    code = KILLED.format(chunk=SMALL_CHUNKS, source=str(QWEN), out=str(tmp_path / "out"), **names)
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    if before != "the name":
        refuse_what_is_there(tmp_path / "out")
    assert jaxmoe.convert_to_orbax(QWEN, tmp_path / "out").bytes_kept > 0 or before == "the first chunk"
    assert check_digests(tmp_path / "out").different == ()
    assert_same_parameters(*[jaxmoe.load(path, mesh=mesh_of(1, 1, 8)) for path in (tmp_path / "out", QWEN)])


# --- refusals


def cut_chunk(path: Path) -> None:
    file = path / "weights" / "layers.0.moe.w_down" / "0.0.0"
    file.write_bytes(file.read_bytes()[:-1])


def lose_chunk(path: Path) -> None:
    (path / "weights" / "layers.0.moe.w_down" / "0.0.0").unlink()


def change_shape(path: Path) -> None:
    file = path / "weights" / "norm.weight" / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chunks": [1]}))


def described(**changes):
    def change(path: Path) -> None:
        file = path / "jaxmoe_checkpoint.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def lose_parameter(path: Path) -> None:
    parameters = json.loads((path / "jaxmoe_checkpoint.json").read_text())["parameters"]
    described(parameters={name: one for name, one in parameters.items() if name != "layers.1.moe.w_router"})(path)


def lead_out(path: Path) -> None:
    parts = json.loads((path / "jaxmoe_checkpoint.json").read_text())
    described(arrays={**parts["arrays"], "../norm": parts["arrays"]["norm.weight"]})(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_chunk, "a chunk of layers.0.moe.w_down has .* bytes; this one has"),
        (lose_chunk, "is missing: a chunk of layers.0.moe.w_down"),
        (change_shape, "chunks of norm.weight is .* and this has"),
        (described(version=99), "reads version 1 .* is of version 99"),
        (described(arrays={}), "which is no array"),
        (described(tied=True), "fills no parameter"),
        (lose_parameter, "'layers.1.moe.w_router' is missing"),
        (lead_out, "an array is called by a parameter's path"),
    ],
)
def test_damage_is_an_error_before_anything_is_read(damage, message, stored, tmp_path) -> None:
    shutil.copytree(stored, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        jaxmoe.load(tmp_path / "out", mesh=mesh_of(1, 1, 8))


def test_digests_find_a_changed_bit(stored, tmp_path) -> None:
    assert check_digests(stored).different == ()
    shutil.copytree(stored, tmp_path / "out")
    file = tmp_path / "out" / "weights" / "layers.1.moe.w_gate_up" / "1.0.0.0"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    (tmp_path / "out" / "placement.json").write_text("[]")
    assert check_digests(tmp_path / "out").different == (str(file), str(tmp_path / "out" / "placement.json"))
    with pytest.raises(CheckpointError, match="has no jaxmoe_checkpoint.json"):
        check_digests(QWEN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "int8"}, "dtype is float32, bfloat16 or float16"),
        ({"placement": ExpertPlacement.linear(12, 4)}, "layer 0 has 11 experts, and its placement is of 12"),
        ({"placement": ["linear"]}, "one for each of its 2 MoE layers; got 1 of str"),
        ({"mtp": True}, "multi-token prediction"),
    ],
)
def test_bad_arguments(settings, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        jaxmoe.convert_to_orbax(QWEN, tmp_path / "out", **settings)
    assert not any(tmp_path.iterdir())


def test_what_does_not_go(stored, tmp_path, monkeypatch) -> None:
    for settings in ({"adapter": tmp_path}, {"adapters": {"a": tmp_path}}):
        with pytest.raises(ValueError, match="an adapter changes tensors by the names of the original"):
            jaxmoe.load(stored, mesh=mesh_of(1, 1, 8), **settings)
    model = jaxmoe.load(stored, mesh=mesh_of(1, 1, 8))
    with pytest.raises(ValueError, match="an adapter changes tensors by the names of the original"):
        jaxmoe.add_adapter(model, "a", tmp_path)
    with pytest.raises(FileExistsError, match="overwrite replaces it"):
        jaxmoe.convert_to_orbax(QWEN, stored)
    with pytest.raises(ValueError, match="name a directory beside it"):
        jaxmoe.convert_to_orbax(stored, stored, overwrite=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10, 10))
    with pytest.raises(OSError, match="bytes more, and .* has 10 free"):
        jaxmoe.convert_to_orbax(QWEN, tmp_path / "full")
