"""A directory of files is one checkpoint, or is refused with a reason."""

import json

import numpy as np
import pytest

from jaxmoe.checkpoint import CheckpointError, open_checkpoint
from tests.support.writing import write_checkpoint, write_file, write_index

TENSORS = {name: np.full((2,), i, np.float32) for i, name in enumerate("abcde")}


def test_one_file_sharded_and_lone_file_hold_the_same(tmp_path):
    single = open_checkpoint(write_checkpoint(tmp_path / "single", TENSORS))
    sharded = open_checkpoint(write_checkpoint(tmp_path / "sharded", TENSORS, shards=3))
    lone = open_checkpoint(write_file(tmp_path / "lone.safetensors", TENSORS))
    assert set(single.tensors) == set(sharded.tensors) == set(lone.tensors) == set(TENSORS)
    assert single.nbytes == sharded.nbytes == 40
    assert [len(c.files) for c in (single, sharded, lone)] == [1, 3, 1]


def test_files_may_be_links_as_in_the_hub_cache(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_checkpoint(blobs, TENSORS, shards=2)
    for index, blob in enumerate(sorted(blobs.iterdir())):
        hashed = blob.rename(blobs / f"{index:064x}")
        (snapshot / blob.name).symlink_to(f"../../blobs/{hashed.name}")
    assert set(open_checkpoint(snapshot).tensors) == set(TENSORS)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\x.safetensors", "..", "", "x.bin",
     ".safetensors", "c:x.safetensors", "a\0.safetensors"],
)  # fmt: skip
def test_an_index_names_plain_files_only(name, tmp_path):
    write_index(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match="beside the index, without any path") as caught:
        open_checkpoint(tmp_path)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON: it must be well-formed"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "only once; 'a' is there 2 times"),
        ("{}", "must have a weight_map"),
        ("[]", "must have a weight_map"),
        ('{"weight_map": ["a"]}', "must have a weight_map"),
        ('{"weight_map": {"a": 3}}', "must be a string; that of 'a' is 3"),
        (b"\xff", "must be UTF-8"),
    ],
)
def test_malformed_indexes_are_refused(text, message, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert message in str(caught.value)


def test_missing_shards_are_counted(tmp_path):
    write_checkpoint(tmp_path, TENSORS, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 files .* 'model-00002-of-00003.safetensors'; finish"):
        open_checkpoint(tmp_path)


def test_index_and_files_must_agree(tmp_path):
    write_checkpoint(tmp_path, TENSORS, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    weight_map["a"] = weight_map["b"]
    weight_map["ghost"] = weight_map["c"]
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="has 2 problems") as caught:
        open_checkpoint(tmp_path)
    assert "tensor 'a' is said to be in 'model-00002-of-00002.safetensors' and is in" in str(caught.value)
    assert "tensor 'ghost' is said to be in 'model-00001-of-00002.safetensors', which does not hold it" in str(
        caught.value
    )


def test_a_tensor_in_two_files_is_refused(tmp_path):
    write_checkpoint(tmp_path, TENSORS, shards=2)
    write_file(tmp_path / "model-00002-of-00002.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match="tensor 'a' is in two files"):
        open_checkpoint(tmp_path)


def test_tensors_that_the_index_forgot_are_there_all_the_same(tmp_path):
    write_checkpoint(tmp_path, TENSORS, shards=2)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    del weight_map["c"]
    write_index(tmp_path, weight_map)
    assert "c" in open_checkpoint(tmp_path).tensors


def test_single_file_beside_an_index_is_ambiguous(tmp_path):
    write_checkpoint(tmp_path, TENSORS, shards=2)
    write_file(tmp_path / "model.safetensors", TENSORS)
    with pytest.raises(CheckpointError, match="both are there"):
        open_checkpoint(tmp_path)
    write_index(tmp_path, dict.fromkeys(TENSORS, "model.safetensors"))
    assert len(open_checkpoint(tmp_path).files) == 1


def test_what_is_there_instead_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="holds no weights at all"):
        open_checkpoint(tmp_path)
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin; .* name that file"):
        open_checkpoint(tmp_path)
    (tmp_path / "consolidated.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin, consolidated.safetensors; .* name that file"):
        open_checkpoint(tmp_path)
