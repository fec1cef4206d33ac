"""``jaxmoe convert`` through `main`: both ways, outputs, exit statuses."""

import json
from pathlib import Path

import pytest

from jaxmoe.checkpoint import open_checkpoint
from jaxmoe.cli import main
from jaxmoe.placement import ExpertPlacement, placements_to_json
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


def test_to_orbax_and_what_commands_say_of_it(tmp_path, capsys) -> None:
    out, placement = tmp_path / "out", tmp_path / "placement.json"
    placement.write_text(placements_to_json([ExpertPlacement.linear(16, 8)]))
    argv = ["convert", str(DEMO), str(out), "--to", "orbax", "--dtype", "bfloat16"]
    assert main([*argv, "--placement", str(placement)]) == 1
    assert "one for each of its 6 MoE layers; got 1" in capsys.readouterr().err
    placement.write_text(ExpertPlacement.linear(16, 8).to_json())
    assert main([*argv, "--placement", str(placement)]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 68 arrays, 14.4 MB, ")
    assert {path.name for path in out.iterdir()} >= {"weights", "config.json", "tokenizer.json", "placement.json"}

    told = []
    for path in (DEMO, out):
        assert main(["inspect", str(path), "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    same = (
        "model_type",
        "problems",
        "layers",
        "moe_layers",
        "experts",
        "dtypes",
        "parameters",
        "active_parameters",
        "bytes",
    )
    assert [told[0][key] for key in same] == [told[1][key] for key in same]
    assert [told[0]["groups"][group]["bytes"] for group in told[0]["groups"]] == [
        told[1]["groups"][group]["bytes"] for group in told[0]["groups"]
    ]
    assert told[1]["layouts"] == {"Orbax arrays, experts in order": [0, 1, 2, 3, 4, 5]}
    for path in (DEMO, out):
        assert main(["plan", str(path), "--mesh", "ep=8", "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[2]["bytes_per_device"] == told[3]["bytes_per_device"]

    assert main(["inspect", str(out), "--digests"]) == 0
    assert "68 chunks of arrays and 5 other files are what was written" in capsys.readouterr().out
    (out / "config.json").write_text("{}")
    assert main(["inspect", str(out), "--digests"]) == 1
    assert f"1 of 73 files are not what was written: {out}/config.json" in capsys.readouterr().err
    assert main(["inspect", str(out), "--mapping"]) == 1
    assert "needs the tensors of the original" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "fused"], "--form goes with --to safetensors"),
        (["--quantize", "int8"], "--quantize goes with --to safetensors"),
        (["--mesh", "ep=8"], "--mesh goes with --to safetensors"),
        (["--adapter", "there"], "--adapter goes with --to safetensors"),
        (["--placement", "linear"], "name a strategy where the checkpoint is loaded"),
    ],
)
def test_what_does_not_go_with_orbax(options, message, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["convert", str(DEMO), str(tmp_path / "out"), "--to", "orbax", *options])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
