"""``jaxmoe convert`` through `main`: both ways, outputs, exit statuses."""

import json
from pathlib import Path

import pytest

from jaxmoe.checkpoint import open_checkpoint
from jaxmoe.cli import main
from tests.support.saved import assert_same_tensors

GOLDENS = Path(__file__).resolve().parent.parent / "goldens" / "qwen3_moe"
DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.mark.parametrize(
    "devices", [[], ["--mesh", "dp=2,tp=2,ep=2", "--simulate", "8", "--placement", "round_robin"], ["--simulate", "8"]]
)
def test_both_ways_write_the_same(devices, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    argv = ["convert", str(GOLDENS / "original"), str(out), "--to", "safetensors", "--form", "fused", "--json"]
    assert main([*argv, "--max-shard-size", "70KB", *devices]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(out)
    assert report["form"] == "fused"
    assert len(report["files"]) > 1
    assert report["tensors"] == len(open_checkpoint(out).tensors)
    assert_same_tensors(out, GOLDENS / "fused")


def test_a_sentence_for_people_and_the_side_files(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(DEMO), str(out), "--dtype", "float32"]) == 0
    sentence = capsys.readouterr().out
    assert sentence.startswith(f"{out}: ")
    assert "(per_expert), 28.8 MB in 1 file, " in sentence
    beside = {"README.md", "loss.png", "traces"}
    assert {path.name for path in out.iterdir()} == {path.name for path in DEMO.iterdir()} - beside
    assert {tensor.dtype_name for tensor in open_checkpoint(out).tensors.values()} == {"F32"}
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_errors_of_quantizing_are_a_table_or_json(tmp_path, capsys) -> None:
    argv = ["convert", str(DEMO), str(tmp_path / "out"), "--quantize", "fp8_block", "--overwrite"]
    assert main(argv) == 0
    sentence, *table = capsys.readouterr().out.splitlines()
    assert "tensors (per_expert), 7.61 MB in 1 file" in sentence
    assert "Errors of fp8_block" in table[0]
    assert "attention" in table[2]
    assert "routed experts" in table[2]
    assert main([*argv, "--json", "--ignore", "self_attn", "--ignore", r"re:.*\.experts\.\d\."]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["quantized"] == "fp8_block"
    # Six of sixteen experts have numbers of two digits.
    assert [(loss["layer"], loss["kind"], loss["weights"]) for loss in report["losses"]] == [
        (layer, "routed experts", 3 * 6) for layer in range(6)
    ]
    assert all(0.02 < loss["rms"] < 0.03 < loss["max"] < 0.04 for loss in report["losses"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "out"], "config.json does not exist"),
        ([str(DEMO), "."], "is there; overwrite replaces it"),
        ([str(DEMO), "out", "--dtype", "int4"], "dtype is float32"),
        ([str(DEMO), "out", "--max-shard-size", "much"], "max_shard_size is a number of bytes"),
        ([str(DEMO), "out", "--quantize", "int5"], "quantize is one of fp8_block, int8"),
        ([str(DEMO), "out", "--quantize", "mxfp4"], "groups of 32 inputs must divide the 112 inputs"),
        ([str(DEMO), "out", "--ignore", "mlp"], "quantize is None"),
        ([str(DEMO), "out", "--placement", "x.json"], "the placement file x.json does not exist"),
    ],
)
def test_an_error_in_the_input_is_one_line_and_status_1(argv, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    assert main(["convert", *argv]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("jaxmoe: error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize(
    "argv", [[], [str(DEMO)], [str(DEMO), "out", "--to", "gguf"], [str(DEMO), "out", "--form", "x"]]
)
def test_wrong_usage_is_status_2(argv, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(["convert", *argv])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("usage: jaxmoe convert")
