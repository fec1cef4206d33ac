"""The plan says what a load then holds, for every mesh; and it needs neither devices nor weights."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import jaxmoe
from jaxmoe import ExpertPlacement
from jaxmoe.cli import main
from jaxmoe.models.decoder import Decoder
from jaxmoe.planning import plan
from tests.support.goldens import GOLDENS
from tests.support.meshes import MESH_SHAPES, mesh_of
from tests.support.published import QWEN3_30B, WHOLE

QWEN = GOLDENS / "qwen3_moe" / "original"
QWEN_30B = QWEN3_30B | {"num_hidden_layers": 48, "torch_dtype": "bfloat16"}


@pytest.fixture
def qwen_30b(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_30B))
    return tmp_path


def cache_bytes(model: Decoder, batch_size: int, max_length: int) -> dict[int, int]:
    held = dict.fromkeys([device.id for device in model.mesh.devices.flat], 0)
    for array in jax.tree.leaves(model.init_cache(model.padded_batch(batch_size), max_length)):
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return held


@pytest.mark.covering(most=5)
@pytest.mark.parametrize("shape", MESH_SHAPES, ids=str)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_load_holds_what_the_plan_says(family, shape) -> None:
    path, (dp, tp, ep) = GOLDENS / family / "original", shape
    for placement, expert_axes in [("linear", ("ep",)), ("round_robin", ("ep", "tp"))]:
        report = plan(
            path, dp=dp, tp=tp, ep=ep, placement=placement, expert_axes=expert_axes, batch_size=5, max_length=64
        )
        mesh = mesh_of(*shape)
        model = jaxmoe.load(path, mesh=mesh, placement=placement, expert_axes=expert_axes)
        number = {device.id: index for index, device in enumerate(mesh.devices.flat)}
        cache = cache_bytes(model, 5, 64)
        held = {number[id]: size + cache[id] for id, size in model.load_report.bytes_per_device.items()}
        assert report.held_per_device == held
        experts = sum(report.parts.get(name, 0) for name in ("routed experts", "replicas", "padding slots"))
        by_device = {number[id]: size for id, size in model.load_report.expert_bytes_per_device.items()}
        assert dict(enumerate(experts)) == by_device


def test_replicas_and_padding_are_told_apart() -> None:
    placement = ExpertPlacement(11, 4, [*range(11), 0, 1, 2, -1, -1])
    parts = plan(QWEN, ep=4, placement=placement).parts
    per_slot = 2 * 3 * 32 * 24 * 4
    np.testing.assert_array_equal(parts["routed experts"], np.array([4, 4, 3, 0]) * per_slot)
    np.testing.assert_array_equal(parts["replicas"], np.array([0, 0, 1, 2]) * per_slot)
    np.testing.assert_array_equal(parts["padding slots"], np.array([0, 0, 0, 2]) * per_slot)


def test_a_published_model_on_more_devices_than_there_are(qwen_30b) -> None:
    report = plan(qwen_30b, dp=2, tp=4, ep=8, device="h100", batch_size=256, max_length=8192)
    assert report.parameters == 30_532_122_624
    assert len(report.bytes_per_device) == 64
    assert report.parts["routed experts"].sum() == 2 * 48 * 128 * 3 * 2048 * 768 * 2
    assert report.fits
    assert not plan(qwen_30b, device="a100-40gb").fits
    assert json.loads(json.dumps(report.to_dict()))["fits"] is True


@pytest.mark.covering(most=2)
@pytest.mark.parametrize("name", WHOLE)
def test_published_models_have_as_many_parameters_as_in_transformers(name, tmp_path) -> None:
    config, parameters = WHOLE[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = plan(tmp_path, ep=8, device="h100", max_length=4096)
    assert (report.parameters, report.dtype) == (parameters, "bfloat16")


@pytest.mark.full
def test_nothing_starts_a_backend(qwen_30b) -> None:
    code = f"""
import jaxmoe
from jax._src import xla_bridge
jaxmoe.plan({str(qwen_30b)!r}, tp=2, ep=4)
assert not xla_bridge.backends_are_initialized()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ep": 0}, "ep is an integer of at least 1; got 0"),
        ({"tp": 3}, "tp=3 does not divide"),
        ({"max_length": 4096}, "the model has 512 positions: max_length=4096"),
        ({"device": "tpu"}, r"devices are .*h100.*; got 'tpu'"),
        ({"dtype": "float8"}, r"dtype is one of float32, bfloat16, float16; got 'float8'"),
        ({"placement": "nowhere"}, "placement strategies are"),
    ],
    ids=str,
)
def test_misfits(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        plan(QWEN, **{"max_length": 64, **options})


def test_the_command(qwen_30b, capsys) -> None:
    assert main(["plan", str(qwen_30b), "--mesh", "tp=2,ep=4", "--device", "h100"]) == 0
    out = capsys.readouterr().out
    assert "30.5B parameters in bfloat16 on dp=1,tp=2,ep=4; 3.35B active per token" in " ".join(out.split())
    assert "fits in the 85 GB of h100" in out
    assert re.search(r"routed experts +│ +7.25 GB │ +7.25 GB", out)
    assert main(["plan", str(qwen_30b), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes_per_device"] == {"0": sum(part[0] for part in report["parts"].values())}
    assert main(["plan", str(qwen_30b), "--mesh", "tp=3"]) == 1
    assert "tp=3 does not divide" in capsys.readouterr().err
