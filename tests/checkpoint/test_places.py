"""A checkpoint is found by its directory, a file in it, shards without an index, and its name in the hub's cache."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint import CheckpointError, open_checkpoint
from jaxmoe.models import read_model_config
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of
from tests.support.saved import read_all
from tests.support.writing import write_checkpoint, write_file

SOURCE = GOLDENS / "olmoe" / "original"
TENSORS = {name: np.full((2,), i, np.float32) for i, name in enumerate("abcde")}
SHARD = "model-{:05d}-of-00003.safetensors"


def sharded(directory: Path) -> Path:
    write_checkpoint(directory, TENSORS, shards=3)
    (directory / "model.safetensors.index.json").unlink()
    return directory


def cached(home: Path, name: str, *commits: str, main: str | None = None) -> Path:
    """A model in the hub's cache, its config.json and weights as links."""
    root = home / ".cache" / "huggingface" / "hub" / f"models--{name.replace('/', '--')}"
    for commit in commits:
        (root / "snapshots" / commit).mkdir(parents=True)
        for file in SOURCE.iterdir():
            (root / "snapshots" / commit / file.name).symlink_to(file.resolve())
    if main is not None:
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(f"{main}\n")
    return root


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_numbered_shards_need_no_index(tmp_path):
    found = open_checkpoint(sharded(tmp_path))
    assert found.tensors.keys() == TENSORS.keys()
    assert [file.path.name for file in found.files] == [SHARD.format(number) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("gone", "message"),
    [([2], f"1 of the 3 files .*: '{SHARD.format(2)}'"), ([1, 3], f"2 of the 3 .*: '{SHARD.format(1)}'")],
)
def test_missing_numbers_are_named(gone, message, tmp_path):
    sharded(tmp_path)
    for number in gone:
        (tmp_path / SHARD.format(number)).unlink()
    with pytest.raises(FileNotFoundError, match=rf"index.json is missing, and {message}.*; finish the download"):
        open_checkpoint(tmp_path)


def test_two_sets_of_shards_are_ambiguous(tmp_path):
    sharded(tmp_path)
    write_file(tmp_path / "other-00001-of-00001.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match=r"there are 2: model-\*-of-00003.safetensors, other-\*-of-00001"):
        open_checkpoint(tmp_path)


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("name", ["model-00001-of-00001.safetensors", "weights.safetensors"])
def test_one_file_of_another_name_is_loaded_with_its_config(name, tmp_path):
    shutil.copytree(SOURCE, tmp_path / "c", ignore=shutil.ignore_patterns("*.safetensors"))
    write_file(tmp_path / "c" / name, read_all(SOURCE))
    mesh, tokens = mesh_of(1, 1, 1), [[1, 2, 3]]
    model = jaxmoe.load(tmp_path / "c" / name, mesh=mesh)
    wanted = jaxmoe.load(SOURCE, mesh=mesh)(tokens)
    np.testing.assert_array_equal(model(tokens), wanted)
    assert model.source == tmp_path / "c"
    jaxmoe.save(model, tmp_path / "saved")
    jaxmoe.convert(tmp_path / "c" / name, tmp_path / "converted")
    for written in ("saved", "converted"):
        np.testing.assert_array_equal(jaxmoe.load(tmp_path / written, mesh=mesh)(tokens), wanted)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", SHARD.format(2)])
def test_a_file_beside_the_weights_stands_for_its_directory(name, tmp_path):
    write_checkpoint(tmp_path, TENSORS, shards=3)
    shutil.copy(SOURCE / "config.json", tmp_path)
    assert open_checkpoint(tmp_path / name).tensors.keys() == TENSORS.keys()
    assert read_model_config(tmp_path / name)[1].model_type == "olmoe"


def test_a_bare_config_is_planned(tmp_path):
    shutil.copy(SOURCE / "config.json", tmp_path)
    assert jaxmoe.plan(tmp_path / "config.json").parameters == jaxmoe.plan(SOURCE).parameters


def test_a_name_on_the_hub_is_its_snapshot_in_the_cache(home):
    root = cached(home, "owner/name", "abc", "def", main="def")
    model = jaxmoe.load("owner/name", mesh=mesh_of(1, 1, 1))
    assert model.source == root / "snapshots" / "def"
    assert jaxmoe.plan("owner/name").parameters == jaxmoe.plan(root).parameters == jaxmoe.plan(SOURCE).parameters


def test_a_name_on_the_hub_with_one_snapshot_or_several_or_none(home):
    root = cached(home, "owner/one", "abc")
    assert {file.path.parent for file in open_checkpoint("owner/one").files} == {root / "snapshots" / "abc"}
    cached(home, "owner/two", "abc", "def")
    with pytest.raises(ValueError, match="has 2 snapshots and none is marked as main; name the directory of one"):
        open_checkpoint("owner/two")
    with pytest.raises(
        FileNotFoundError, match=r"no directory owner/none, and .* has no models--owner--none; download it"
    ):
        jaxmoe.load("owner/none", mesh=mesh_of(1, 1, 1))


def test_a_directory_that_is_there_comes_before_the_cache(home):
    cached(home, "owner/name", "abc")
    shutil.copytree(SOURCE, home / "owner" / "name")
    config = json.loads((SOURCE / "config.json").read_text())
    (home / "owner" / "name" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert read_model_config("owner/name")[1].dtype == "bfloat16"
