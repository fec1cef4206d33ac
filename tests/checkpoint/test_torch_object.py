"""Files of torch.save with tensors anywhere in nested dicts and lists."""

from pathlib import Path

import numpy as np
import pytest

from jaxmoe.checkpoint.errors import CheckpointError
from jaxmoe.checkpoint.formats.torch_object import read_torch_object
from tests.support.torch_archives import DATA, archive, count, number, pack, program, state_dict, storage, tensor, text


def test_tensors_become_arrays_wherever_they_are() -> None:
    dump = read_torch_object(DATA / "torch_recorder.pt")
    assert list(dump) == ["records", "last_physical_to_logical_map"]
    assert dump["last_physical_to_logical_map"].tolist() == [[0, 1, 2, 3, 0], [3, 2, 1, 0, 1]]
    assert len(dump["records"]) == 3
    for step, record in enumerate(dump["records"]):
        ids = record.pop("topk_ids_of_layer")
        np.testing.assert_array_equal(ids, (np.arange(16, dtype=np.int32).reshape(2, 4, 2) + step) % 5, strict=True)
        assert record.pop("forward_pass_id") == step
        assert record == {"rank": 0, "gatherer_key": "primary", "extend_seq_lens": [4], "positions": None}


def test_transposed_tensors_are_as_they_were() -> None:
    read = read_torch_object(DATA / "torch_permuted.bin")
    np.testing.assert_array_equal(read["transposed"], count(4, 6).T, strict=True)
    np.testing.assert_array_equal(read["permuted"], count(2, 3, 4).transpose(2, 0, 1), strict=True)


def test_what_is_no_tensor_stays_and_may_contain_itself(tmp_path: Path) -> None:
    read = read_torch_object(archive(tmp_path / "a.pt", state_dict(w=tensor(), x=b"]q\x00h\x00a")))
    np.testing.assert_array_equal(read["w"], count(2, 3))
    assert read["x"][0] is read["x"]
    assert read_torch_object(archive(tmp_path / "b.pt", program(text("alone")))) == "alone"
    np.testing.assert_array_equal(read_torch_object(archive(tmp_path / "c.pt", program(tensor()))), count(2, 3))


@pytest.mark.parametrize("nesting", [b"]" * 100_000 + b"a" * 99_999, b"(]q\x00" + b"](h\x00h\x00eq\x00" * 60 + b"t"])
def test_nesting_and_sharing_cost_nothing(tmp_path: Path, nesting: bytes) -> None:
    read = read_torch_object(archive(tmp_path / "a.pt", state_dict(x=nesting, w=tensor())))
    np.testing.assert_array_equal(read["w"], count(2, 3))


def test_refusals_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.pt: tensors are in dicts and lists; one is in a tuple of 1"):
        read_torch_object(archive(tmp_path / "a.pt", program(pack(tensor()))))
    with pytest.raises(CheckpointError, match=r"b\.pt.*only the names of a dict of tensors are allowed"):
        read_torch_object(archive(tmp_path / "b.pt", program(b"cos\nsystem\n")))
    whole = tensor(storage(numel=number(10_000)), shape=(100, 100), strides=(100, 1))
    document = state_dict(**dict.fromkeys([f"w{i}" for i in range(128)], whole))
    with pytest.raises(CheckpointError, match=r"c\.pt: tensors that share storages may have up to 64 times the bytes"):
        read_torch_object(archive(tmp_path / "c.pt", document, more={"archive/data/0": bytes(40_000)}))
