"""Checkpoints in the quantized formats that people publish: they load as the plain ones that hold the decoded values."""

import json
import re

import numpy as np
import pytest

import jaxmoe
from jaxmoe.checkpoint.inspection import summarize
from tests.support.meshes import mesh_id, mesh_of
from tests.support.quantized_checkpoints import CASES, DECODED, write_pair
from tests.support.saved import assert_same_parameters, read_all


@pytest.fixture(scope="module", params=CASES, ids=[f"{family}-{form}" for family, form, _ in CASES])
def pair(request, tmp_path_factory):
    family, form, block = request.param
    return *write_pair(tmp_path_factory.mktemp("quantized"), family, form, block), form


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 2)], ids=mesh_id)
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_it_loads_as_its_values_do(pair, shape, placement) -> None:
    quantized, plain, count, form = pair
    models = [
        jaxmoe.load(path, mesh=mesh_of(*shape), placement=placement, dtype="float32", quantized="dequantize")
        for path in (quantized, plain)
    ]
    assert_same_parameters(*models)
    report = models[0].load_report
    assert sum(report.decoded.values()) == count > 20 or form == "mxfp4"
    assert report.bytes_needed <= report.bytes_read < 2 * report.bytes_needed  # tables are read for every piece
    assert report.bytes_needed < models[1].load_report.bytes_needed
    assert report.bytes_per_device == models[1].load_report.bytes_per_device


def test_it_is_converted_to_its_values(pair, tmp_path) -> None:
    quantized, plain, _, _ = pair
    jaxmoe.convert(quantized, tmp_path / "out", dtype="float32")
    jaxmoe.convert(plain, tmp_path / "expected", dtype="float32")
    ours, theirs = read_all(tmp_path / "out"), read_all(tmp_path / "expected")
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_it_is_inspected_as_what_it_holds(pair) -> None:
    quantized, plain, _, form = pair
    found, expected = summarize(quantized), summarize(plain)
    assert not found.problems
    assert not expected.held
    kept = [sentence for sentence in found.held if sentence.startswith("kept packed: ")]
    if form in DECODED:
        assert not kept
        assert any("does not stay packed" in sentence for sentence in found.held)
    else:
        assert re.search(r"routed experts as \w+, \w+ scales of ", *kept)
    assert found.quantization is not None
    assert (found.parameters, found.active_parameters) == (expected.parameters, expected.active_parameters)
    assert found.bytes < expected.bytes
