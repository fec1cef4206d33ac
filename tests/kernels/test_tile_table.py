"""The tables of tuned tiles: found by shape class, silent where nothing was measured, never half written."""

import dataclasses
import importlib
import json
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.kernels.grouped_matmul import expert_mlp, tile_table
from jaxmoe.kernels.grouped_matmul.backends import GPU_BACKENDS
from jaxmoe.kernels.grouped_matmul.tile_table import TILE_TABLES, lookup, read_table, row_class, table_file, write_table

DEVICE = "NVIDIA H100 80GB HBM3"
SHAPE = {"kernel": "mosaic_gpu", "dtype": "bfloat16", "out_dtype": "float32", "K": 4096, "N": 14336}


def entry(row_class, m, **change):
    return {**SHAPE, "row_class": row_class, "tiles": {"m": m, "n": 128}, "seconds": 1e-3} | change


def table(*entries):
    return {"device": DEVICE, "entries": list(entries)}


@pytest.mark.parametrize("name", ["triton", "mosaic_gpu"])
def test_kernels_take_what_was_measured(name, monkeypatch):
    if jax.__version_info__ < GPU_BACKENDS[name].since:
        pytest.skip("needs a newer jax")
    kernel = importlib.import_module(GPU_BACKENDS[name].module)
    warps = {"warps": 4} if name == "triton" else {}
    asked = []

    def measured(device_kind, **shape):
        asked.append((device_kind, *shape.values()))
        return {"tiles": dataclasses.asdict(kernel.Tiles(m=128, n=128, k=64, stages=2, **warps))}

    monkeypatch.setattr(tile_table, "lookup", measured)
    monkeypatch.setattr(sys.modules[kernel.grouped_matmul.__module__], "choose_tiles", None)
    shapes = [(64, 128), (4, 2, 256, 128), (4, 128, 256)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)
    out = jax.eval_shape(
        lambda *args: expert_mlp(*args, out_dtype="float32", backend=name, device_kind=DEVICE), *arrays, sizes
    )
    assert out.shape == (64, 128)
    assert asked == [
        (DEVICE, f"{name}.gate_up", "bfloat16", "bfloat16", 128, 512, 16),
        (DEVICE, name, "bfloat16", "float32", 256, 128, 16),
    ]


def test_lookup_is_by_device_dtype_and_shape_class(tmp_path):
    write_table(table(entry(128, 64), entry(256, 128)), tmp_path)
    entries = {
        rows: lookup(DEVICE, **SHAPE, rows_per_group=rows, folders=[tmp_path]) for rows in (64, 65, 128, 128.5, 257)
    }
    found = {rows: entry and entry["tiles"] for rows, entry in entries.items()}
    small, large = {"m": 64, "n": 128}, {"m": 128, "n": 128}
    assert found == {64: None, 65: small, 128: small, 128.5: large, 257: None}
    for other in ({"kernel": "triton"}, {"dtype": "float16"}, {"out_dtype": "bfloat16"}, {"K": 2048}, {"N": 4096}):
        assert lookup(DEVICE, **SHAPE | other, rows_per_group=128, folders=[tmp_path]) is None
    assert lookup("NVIDIA H200", **SHAPE, rows_per_group=128, folders=[tmp_path]) is None


def test_what_a_caller_does_with_tiles_does_not_reach_the_table(tmp_path):
    write_table(table(entry(128, 64)), tmp_path)
    lookup(DEVICE, **SHAPE, rows_per_group=128, folders=[tmp_path])["tiles"]["m"] = 7
    assert lookup(DEVICE, **SHAPE, rows_per_group=128, folders=[tmp_path])["tiles"]["m"] == 64


def test_writing_replaces_entries_of_the_same_key_and_keeps_the_others(tmp_path):
    write_table(table(entry(128, 64), entry(256, 64)), tmp_path)
    assert lookup(DEVICE, **SHAPE, rows_per_group=256, folders=[tmp_path])["tiles"]["m"] == 64
    file = write_table(table(entry(256, 128)), tmp_path)
    assert lookup(DEVICE, **SHAPE, rows_per_group=128, folders=[tmp_path])["tiles"]["m"] == 64
    assert lookup(DEVICE, **SHAPE, rows_per_group=256, folders=[tmp_path])["tiles"]["m"] == 128
    assert len(json.loads(file.read_text())["entries"]) == 2
    assert list(tmp_path.iterdir()) == [file]


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = write_table(table(entry(128, 64)), tmp_path)
    before = file.read_text()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_table(table(entry(256, 128, tiles=object())), tmp_path)
    assert file.read_text() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no table of tiles"),
        ("[]", "no table of tiles"),
        ('{"device": "x"}', "no table of tiles"),
        ('{"device": "NVIDIA A100", "entries": []}', "measured on 'NVIDIA A100'"),
        (json.dumps(table({"kernel": "mosaic_gpu"})), "an entry has no dtype"),
    ],
)
def test_a_file_that_is_no_table_is_an_error(text, message, tmp_path):
    table_file(DEVICE, tmp_path).write_text(text)
    with pytest.raises(ValueError, match=rf"{message}.*jaxmoe tune"):
        lookup(DEVICE, **SHAPE, rows_per_group=128, folders=[tmp_path])


def test_shipped_tables_are_measured_ones():
    """Every table of the package can be read and says how long its tiles took."""
    for file in TILE_TABLES.glob("*.json"):
        device = json.loads(file.read_text())["device"]
        assert table_file(device) == file
        assert all(
            entry["seconds"] > 0 and row_class(entry["row_class"]) == entry["row_class"]
            for entry in read_table(device)["entries"]
        )
