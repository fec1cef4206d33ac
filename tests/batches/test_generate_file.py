"""Files through the real engine and command: on several meshes, by several processes, and of a JSON schema."""

import json
import shutil

import jsonschema
import pytest

import jaxmoe
from jaxmoe.batches import LineSettings
from jaxmoe.cli import main
from tests.support.batches import read, write
from tests.support.processes import ROOT, finish, start

DEMO = str(ROOT / "demo")
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["x", "yy"]}, "ok": {"type": "boolean"}},
    "required": ["kind", "ok"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
OPTIONS = ["--max-new-tokens", "6", "--num-slots", "4", "--max-length", "64", "--dtype", "float32", "--seed", "3"]


def lines() -> list:
    texts = ["def main():\n", "import os\n", "x = [", "for i in range("]
    plain = [{"prompt": texts[index % 4], "max_tokens": 2 + index % 5, "temperature": index % 2} for index in range(9)]
    return [
        *plain,
        "{bad",
        {"prompt": [5, 6, 7], "n": 2, "temperature": 1.0, "logprobs": 2, "min_tokens": 3},
        {"prompt": "x = ", "response_format": FORM, "max_tokens": 60, "temperature": 0.7},
        {"prompt": "y", "logit_bias": {"17": 100}},
    ]


def generate(input, output, *options: str) -> int:
    return main(["generate", DEMO, "--input", str(input), "--output", str(output), *OPTIONS, *options])


@pytest.mark.full
def test_the_same_on_every_mesh_and_by_several_processes(tmp_path, capsys) -> None:
    input = write(tmp_path / "in.jsonl", lines())
    whole = tmp_path / "whole.jsonl"
    assert generate(input, whole, "--mesh", "ep=8") == 1
    err = capsys.readouterr().err
    assert "1 of 13 lines have an error" in err
    assert "of mean" in err
    found = read(whole)
    assert [one["line"] for one in found] == list(range(1, 14))
    assert [one["line"] for one in found if "error" in one] == [10]
    jsonschema.validate(json.loads(found[11]["outputs"][0]["text"]), SCHEMA)
    assert len(found[10]["outputs"]) == 2
    assert found[12]["outputs"][0]["text"]

    # It goes on where it was cut, on another mesh than before.
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:4]) + b'{"line": 5, "outp')
    shutil.copy(f"{whole}.run.json", f"{cut}.run.json")
    assert generate(input, cut, "--mesh", "dp=2,tp=2,ep=2", "--no-progress") == 1
    assert _without_logprobs(read(cut)) == _without_logprobs(found)
    starts = json.loads((tmp_path / "cut.jsonl.run.json").read_text())["starts"]
    assert [(one["mesh"]["dp"], one["lines_done_before"]) for one in starts] == [(1, 0), (2, 4)]

    # And by two processes. One that is killed at any point is in test_run.py.
    cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:4]))
    argv = ["generate", DEMO, "--input", str(input), "--output", str(cut), *OPTIONS, "--simulate", "2"]
    ended = finish(start(2, "jaxmoe", *argv))
    assert [one.returncode for one in ended] == [1, 1], "\n".join(one.stderr for one in ended)
    assert _without_logprobs(read(cut)) == _without_logprobs(found)
    starts = json.loads((tmp_path / "cut.jsonl.run.json").read_text())["starts"]
    assert [one["processes"] for one in starts] == [1, 1, 2]


def _without_logprobs(values: list[dict]) -> list[dict]:
    for value in values:
        for output in value.get("outputs", []):
            output.pop("logprobs", None)
    return values


@pytest.mark.full
def test_the_function(tmp_path) -> None:
    model = jaxmoe.load(DEMO, mesh=jaxmoe.make_mesh(ep=8), dtype="float32")
    input = write(tmp_path / "in.jsonl", [{"prompt": "def main():\n"}, {"prompt": "import os\n", "max_tokens": 3}])
    settings = LineSettings(max_new_tokens=5)
    result = jaxmoe.generate_file(
        model, input, tmp_path / "out.jsonl", settings=settings, num_slots=2, max_length=32, progress=True
    )
    outs = jaxmoe.generate(model, ["def main():\n", "import os\n"], max_new_tokens=5)
    texts = [one["outputs"][0]["text"] for one in read(tmp_path / "out.jsonl")]
    assert texts[0] == outs[0].text
    assert outs[1].text.startswith(texts[1])
    assert (result.lines, result.errors, result.generated_tokens) == (2, 0, 8)
    assert model.recorder is None
    with pytest.raises(TypeError, match=r"settings is a jaxmoe.LineSettings"):
        jaxmoe.generate_file(model, input, tmp_path / "out.jsonl", settings={"n": 1})


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input", "in.jsonl"], "--input goes with --output"),
        (["--prompt", "a", "--output", "out.jsonl"], "--output goes with --input"),
        (["--prompt", "a", "--order", "finished"], "--order goes with --input"),
        (["--prompt", "a", "--json-schema", "s.json"], "--json-schema goes with --input"),
        (["--input", "a", "--output", "b", "--json"], "--json goes with --prompt, --prompt-ids or --prompt-file"),
        (["--input", "a", "--output", "b", "--batch-size", "3"], "--batch-size goes with --prompt"),
        (["--input", "a", "--output", "b", "--logit-bias", "5"], "token ids and numbers, as 5=-100,7=2.5; got '5'"),
        (["--input", "a", "--output", "b", "--use-adapter", "sql"], "--use-adapter names one of --adapter NAME=DIR"),
    ],
)
def test_wrong_usage(argv, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", DEMO, *argv])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_what_can_be_refused_is_refused_before_weights_are_read(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(vars(jaxmoe), "load", None)
    assert generate(tmp_path / "none.jsonl", tmp_path / "out.jsonl") == 1
    assert "does not exist" in capsys.readouterr().err
    input = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    assert generate(input, tmp_path / "none" / "out.jsonl") == 1
    assert "cannot be written: No such file" in capsys.readouterr().err
    assert generate(input, tmp_path / "out.jsonl", "--max-length", "2049") == 1
    assert "max_length is an integer from 2 to 2048; got 2049" in capsys.readouterr().err
    (tmp_path / "schema.json").write_text("{")
    assert generate(input, tmp_path / "out.jsonl", "--json-schema", str(tmp_path / "schema.json")) == 1
    assert "a JSON schema is JSON" in capsys.readouterr().err
