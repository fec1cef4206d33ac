"""A model whose output projection is its embedding, from files that hold either of the two, or both."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint.inspection.summary import summarize
from tests.support.adapters import factors, write_adapter
from tests.support.goldens import GOLDENS
from tests.support.meshes import mesh_of
from tests.support.saved import assert_same_parameters, assert_same_tensors, read_all
from tests.support.torch_archives import archive, number, state_dict, storage, tensor, text
from tests.support.writing import write_checkpoint

EMBED, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TENSORS = read_all(GOLDENS / "qwen3_moe" / "original")
TABLE = TENSORS.pop(EMBED)
del TENSORS[OUTPUT]
TOKENS = np.arange(3, 20, dtype=np.int32)[None]


def checkpoint(directory: Path, ends: dict[str, np.ndarray], *, tied: bool = True) -> Path:
    config = json.loads((GOLDENS / "qwen3_moe" / "original" / "config.json").read_text())
    write_checkpoint(directory, TENSORS | ends)
    (directory / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    return directory


def load(directory: Path) -> jaxmoe.models.Decoder:
    return jaxmoe.load(directory, mesh=mesh_of(2, 2, 2))


def write_bin(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """As torch writes it: arrays that are one object share a storage."""
    items, storages, keys = {}, {}, {}
    for name, value in tensors.items():
        key = keys.setdefault(id(value), f"{len(keys)}")
        storages[f"archive/data/{key}"] = value.tobytes()
        strides = tuple(stride // 4 for stride in value.strides)
        items[name] = tensor(storage(text(key), numel=number(value.size)), 0, value.shape, strides)
    archive(path, state_dict(**items), more=storages)


@pytest.fixture(scope="module")
def tied_logits(tmp_path_factory) -> np.ndarray:
    """Of a model that is not tied and has the table twice."""
    directory = checkpoint(tmp_path_factory.mktemp("untied"), {EMBED: TABLE, OUTPUT: TABLE}, tied=False)
    return np.asarray(load(directory)(TOKENS))


@pytest.mark.covering(most=1)
@pytest.mark.parametrize("ends", [(EMBED,), (OUTPUT,), (EMBED, OUTPUT)], ids=str)
def test_either_end_will_do(ends, tied_logits, tmp_path):
    source = checkpoint(tmp_path / "a", dict.fromkeys(ends, TABLE))
    model = load(source)
    np.testing.assert_allclose(model(TOKENS), tied_logits, rtol=0, atol=1e-5 * np.abs(tied_logits).max())
    assert model.load_report.ignored == {}
    assert summarize(source).problems == ()
    for written in (jaxmoe.save(model, tmp_path / "b"), jaxmoe.convert(source, tmp_path / "c")):
        assert_same_parameters(load(Path(written.path)), model)


def test_ends_that_differ_are_not_tied(tmp_path):
    ends = {EMBED: TABLE, OUTPUT: TABLE[::-1]}
    model = load(checkpoint(tmp_path / "a", ends))
    assert_same_parameters(model, load(checkpoint(tmp_path / "b", ends, tied=False)))
    jaxmoe.save(model, tmp_path / "c")
    assert_same_tensors(tmp_path / "c", tmp_path / "a")


def test_files_of_torch_hold_the_same_bytes_under_both_names(tied_logits, tmp_path):
    source = checkpoint(tmp_path / "a", {})
    (source / "model.safetensors").unlink()
    write_bin(source / "pytorch_model.bin", TENSORS | {EMBED: TABLE, OUTPUT: TABLE})
    model = load(source)
    np.testing.assert_allclose(model(TOKENS), tied_logits, rtol=0, atol=1e-5 * np.abs(tied_logits).max())
    assert model.load_report.ignored == {"tied output projection": (OUTPUT,)}
    assert summarize(source).ignored == {"tied output projection": [OUTPUT]}
    # What is written has the embedding alone, so that no other dtype can make the two differ.
    for report in (jaxmoe.save(model, tmp_path / "b"), jaxmoe.convert(source, tmp_path / "c", dtype="bfloat16")):
        written = read_all(Path(report.path))
        assert OUTPUT not in written
        assert report.carried == 0
    assert written[EMBED].dtype == ml_dtypes.bfloat16


def test_an_adapter_of_one_of_two_ends_is_refused_where_nobody_knows_whether_they_are_equal(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", factors("lm_head", *TABLE.shape))
    both = {EMBED: TABLE, OUTPUT: TABLE}
    with pytest.raises(ValueError, match="config.json ties the two, .* and the adapter is of 'lm_head.weight'"):
        jaxmoe.load(checkpoint(tmp_path / "a", both), mesh=mesh_of(1, 1, 1), adapter=adapter)
    untied = jaxmoe.load(checkpoint(tmp_path / "b", both, tied=False), mesh=mesh_of(1, 1, 1), adapter=adapter)
    assert untied.load_report.adapter.merged == {OUTPUT: 1}
