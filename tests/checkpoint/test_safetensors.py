"""The strict header reader: every malformed file is refused with its own message, every valid oddity is read."""

import functools
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxmoe.checkpoint import CheckpointError, read_safetensors
from jaxmoe.checkpoint.formats.safetensors import MAX_JSON_VALUES, MAX_TENSORS
from jaxmoe.checkpoint.saving.outputs import OutputTensor
from jaxmoe.checkpoint.saving.write import check_written, divide_into_files, write_files
from tests.support.saved import SOURCES
from tests.support.writing import write_file, write_raw

F32x2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def raw(text: bytes | str, data: bytes = b"") -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text + data


def of(header: object, data: bytes = b"") -> bytes:
    return raw(json.dumps(header), data)


ZEROS = bytes(8)
# What is wrong: the file, and what the message says about rule and value.
MALFORMED = {
    "empty file": (b"", "starts with the 8-byte length of its header", "the file has 0 bytes"),
    "cut length": (b"\x01\0\0", "starts with the 8-byte length of its header", "the file has 3 bytes"),
    "header beyond the file": (struct.pack("<Q", 99) + b"{}", "must end inside the file", "claims 99 bytes"),
    "huge header": (b"\x3c\0\0\0\0\xff\xff\xff", "at most 100000000 bytes", "this one claims"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "at most 100000000 bytes", "git lfs pull"),
    "server's answer": (b"<!doctype html><html>", "at most 100000000 bytes", "a server's answer and not the file"),
    "not UTF-8": (raw(b"\xff"), "must be UTF-8", "byte 0"),
    "byte order mark": (raw("\ufeff{}"), "must start with '{'", "\\ufeff"),
    "leading space": (raw(" {}"), "must start with '{'", "' {}'"),
    "no JSON": (raw("{"), "must be well-formed", "at character"),
    "NUL after JSON": (raw("{}\0"), "must be well-formed", "Extra data"),
    "a list": (raw("[]"), "must start with '{'", "'[]'"),
    "deep nesting": (raw('{"a":' + "[" * 200_000), "must not be nested deeply", "nests"),
    "NaN": (raw('{"a": NaN}'), "only JSON values", "NaN"),
    "duplicate tensor": (
        raw(f'{{"a": {json.dumps(F32x2)}, "a": {json.dumps(F32x2)}}}', ZEROS),
        "a key may be there only once",
        "'a' is there 2 times",
    ),
    "duplicate field": (
        raw('{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', ZEROS),
        "a key may be there only once",
        "'dtype'",
    ),
    "duplicate metadata": (raw('{"__metadata__": {}, "__metadata__": {}}'), "only once", "'__metadata__'"),
    "metadata not strings": (of({"__metadata__": {"a": 1}}), "must map strings to strings", "{'a': 1}"),
    "metadata null": (raw('{"__metadata__": null}'), "must map strings to strings", "None"),
    "metadata list": (of({"__metadata__": ["pt"]}), "must map strings to strings", "['pt']"),
    "entry not an object": (of({"a": [1]}), "needs exactly dtype, shape and data_offsets", "[1]"),
    "missing field": (of({"a": {"dtype": "F32", "shape": []}}), "needs exactly dtype, shape and data_offsets", "F32"),
    "extra field": (of({"a": entry(stride=[1])}, ZEROS), "needs exactly dtype, shape and data_offsets", "stride"),
    "unknown dtype": (of({"a": entry("F33")}, ZEROS), "must have a known dtype", "'F33'"),
    "dtype not a string": (of({"a": entry(["F32"])}, ZEROS), "must have a known dtype", "['F32']"),
    "negative dim": (of({"a": entry(shape=(-2,))}, ZEROS), "integers up to 2^48", "[-2]"),
    "float dim": (of({"a": entry(shape=(2.0,))}, ZEROS), "integers up to 2^48", "[2.0]"),
    "bool dim": (of({"a": entry(shape=(True, 2))}, ZEROS), "integers up to 2^48", "[True, 2]"),
    "negative zero": (raw('{"a": {"dtype": "F32", "shape": [-0], "data_offsets": [0, 0]}}'), "64-bit integer", "-0"),
    "endless number": (raw('{"a": ' + "9" * 10_000 + "}"), "64-bit integer", "9999"),
    "huge dim": (of({"a": entry(shape=(2**63 - 1, 2))}, ZEROS), "integers up to 2^48", "9223372036854775807"),
    "zero times huge": (of({"a": entry(shape=(0, 2**60), offsets=(0, 0))}), "integers up to 2^48", "11529"),
    "rank": (of({"a": entry(shape=(1,) * 9, offsets=(0, 4))}, bytes(4)), "at most 8 dims", "it has 9"),
    "one offset": (of({"a": entry(offsets=(0,))}, ZEROS), "two integers", "[0]"),
    "float offset": (of({"a": entry(offsets=(0, 8.0))}, ZEROS), "two integers", "[0, 8.0]"),
    "reversed offsets": (of({"a": entry(offsets=(8, 0))}, ZEROS), "0 <= begin <= end", "[8, 0]"),
    "negative offset": (of({"a": entry(offsets=(-8, 0))}, ZEROS), "0 <= begin <= end", "[-8, 0]"),
    "size mismatch": (
        of({"a": entry(shape=(3,))}, ZEROS),
        "must span the bytes",
        "12 bytes and the offsets [0, 8] span 8",
    ),
    "half a byte": (of({"a": entry("F4", (3,), (0, 1))}, b"\0"), "must fill whole bytes", "12 bits"),
    "gap": (
        of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        "without gaps",
        "'b' starts at 12 and the one before it ends at 8",
    ),
    "gap at the start": (of({"a": entry(offsets=(4, 12))}, bytes(12)), "without gaps", "'a' starts at 4"),
    "overlap": (of({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "must not overlap", "inside 'a'"),
    "same bytes twice": (of({"a": entry(), "b": entry()}, ZEROS), "must not overlap", "inside 'a'"),
    "data cut": (of({"a": entry()}, bytes(6)), "must hold all its tensors", "need 8 bytes and it has 6"),
    "data left over": (of({"a": entry()}, bytes(9)), "must end with the last tensor", "1 bytes follow"),
    "empty name": (of({"": entry()}, ZEROS), "must have a name", "one is empty"),
    "name up": (of({"../../etc/passwd": entry()}, ZEROS), "no '..' path component", "'../../etc/passwd'"),
    "name up, other slash": (of({"a\\..\\b": entry()}, ZEROS), "no '..' path component", "a\\\\..\\\\b"),
    "name with NUL": (of({"a\0b": entry()}, ZEROS), "no NUL", "'a\\x00b'"),
    "name with lone surrogate": (raw('{"\\ud800": ' + json.dumps(F32x2) + "}", ZEROS), "valid Unicode", "\\ud800"),
    "long name": (of({"n" * 1025: entry()}, ZEROS), "at most 1024 bytes", "has 1025"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused(case, tmp_path):
    content, rule, value = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert rule in message
    assert value in message
    assert message.count("; ") >= 2, "the rule, the value, the way out"
    assert len(message) < 600


def test_tensor_count_is_capped(tmp_path):
    path = write_file(tmp_path / "f.safetensors", {name: np.zeros(1, np.float32) for name in "abc"})
    with pytest.raises(CheckpointError, match="at most 2 tensors; this one lists 3"):
        read_safetensors(path, max_tensors=2)
    assert len(read_safetensors(path, max_tensors=3).tensors) == 3


@pytest.mark.parametrize("value", ["[],", "{},", "1,"])
def test_values_are_counted_before_they_are_made(value, tmp_path, monkeypatch):
    monkeypatch.setattr("json.loads", lambda *args, **kwargs: pytest.fail("the header was parsed"))
    path = tmp_path / "f.safetensors"
    path.write_bytes(raw('{"a": [' + MAX_JSON_VALUES * value + "1]}", b""))
    with pytest.raises(CheckpointError, match="must be JSON: it may have up to 14000000 values; it has"):
        read_safetensors(path)


def test_a_header_may_have_as_many_values_as_its_tensors_need(tmp_path):
    path = write_file(tmp_path / "f.safetensors", {name: np.zeros((1,) * 8, np.float32) for name in "abc"})
    data = path.read_bytes()
    header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]].decode()
    marks = sum(header.count(mark) for mark in ",[{")
    assert marks <= 3 * MAX_JSON_VALUES // MAX_TENSORS
    assert list(read_safetensors(path).tensors) == ["a", "b", "c"]


def test_tensors_are_found_where_they_are(tmp_path):
    a, b = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(3, dtype=np.uint8)
    path = write_file(tmp_path / "f.safetensors", {"b": b, "a": a}, metadata={"format": "pt"})
    file = read_safetensors(path)
    assert file.metadata == {"format": "pt"}
    assert list(file.tensors) == ["b", "a"]
    info = file.tensors["a"]
    assert (info.dtype_name, info.dtype, info.shape, info.nbytes) == ("F32", np.float32, (2, 3), 24)
    assert path.read_bytes()[info.offset : info.offset + 24] == a.tobytes()
    assert info.offset % 4, "the data starts unaligned in this file, as the format allows"


def test_valid_oddities_are_read(tmp_path):
    assert read_safetensors(write_raw(tmp_path / "none", "{}      ")).tensors == {}
    # Listed in another order than the data, with a scalar, an empty tensor between two others, and 4-bit elements.
    header = {
        "late": entry("F4", (2, 3), (6, 9)),
        "empty": entry(shape=(0, 7), offsets=(4, 4)),
        "scalar": entry(shape=(), offsets=(0, 4)),
        "u8": entry("U8", (2,), (4, 6)),
    }
    tensors = read_safetensors(write_raw(tmp_path / "odd", header, bytes(9))).tensors
    assert list(tensors) == ["scalar", "empty", "u8", "late"]
    assert tensors["scalar"].shape == ()
    assert tensors["late"].dtype is None


def test_written_by_the_reference(tmp_path):
    values = {"w": np.ones((3, 2), np.float16), "step": np.array(7, np.int64), "mask": np.ones(5, bool)}
    safetensors.numpy.save_file(values, tmp_path / "f", metadata={"format": "np"})
    tensors = read_safetensors(tmp_path / "f").tensors
    assert {name: (t.shape, t.dtype) for name, t in tensors.items()} == {
        n: (v.shape, v.dtype) for n, v in values.items()
    }


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_the_reference_finds_the_same_tensors(source):
    for path in source.glob("*.safetensors"):
        ours = read_safetensors(path)
        with safetensors.safe_open(path, framework="numpy") as theirs:
            parts = {name: theirs.get_slice(name) for name in theirs.keys()}  # noqa: SIM118
            assert {name: (tensor.dtype_name, tensor.shape) for name, tensor in ours.tensors.items()} == {
                name: (part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()
            }
            assert ours.metadata == theirs.metadata()
            for name, tensor in ours.tensors.items():
                raw = path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
                assert raw == theirs.get_tensor(name).tobytes(), name


def test_the_reference_writes_the_same_file(tmp_path):
    """Byte for byte, where tensors come in its order: wide elements first, and by name among equals."""
    rng = np.random.default_rng(0)
    dtypes = {"a": np.uint8, "b": ml_dtypes.bfloat16, "c": np.float32, "d": np.float64}
    values = {f"{key}{i}": rng.normal(size=(i, 3)).astype(dtype) for key, dtype in dtypes.items() for i in range(3)}
    names = {np.dtype(dtype): name for name, dtype in zip(("U8", "BF16", "F32", "F64"), dtypes.values(), strict=True)}
    tensors = [
        OutputTensor(
            name=key,
            dtype_name=names[v.dtype],
            shape=v.shape,
            nbytes=v.nbytes,
            values=functools.partial(values.get, key),
        )
        for key, v in values.items()
    ]
    write_files(tmp_path, divide_into_files(tensors, 10**9))
    safetensors.numpy.save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_library_reads_what_was_written_before_it_counts(tmp_path):
    def tensor(name, shape):
        values = np.ones(shape, np.float32)
        return OutputTensor(name=name, dtype_name="F32", shape=shape, nbytes=values.nbytes, values=lambda: values)

    path, tensors = tmp_path / "model.safetensors", [tensor("a", (2, 3)), tensor("b", (4,))]
    write_files(tmp_path, {path.name: tensors})
    check_written(path, tensors)
    for others in (tensors[:1], [tensor("a", (3, 2)), tensors[1]]):
        with pytest.raises(CheckpointError, match="it finds 2 tensors of"):
            check_written(path, others)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="does not find what was written: .*; is the disk full or failing"):
        check_written(path, tensors)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="must be a regular file"):
        read_safetensors(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "absent")
