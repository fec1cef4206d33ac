"""Runs over a file with the fake engine: outputs, restarts, and what is refused."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

import jaxmoe.batches.run
from jaxmoe.batches import Batch, LineSettings
from jaxmoe.batches.output import OutputFile
from jaxmoe.batches.progress import State, progress
from jaxmoe.generation import SamplingParams
from tests.support.batches import byte_level, checkpoint, many_lines, outline, read, run, write
from tests.support.fake_engine import FakeEngine, tokens_of
from tests.support.processes import ROOT, environment

VOCAB = byte_level().get_vocab_size()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("batches") / "checkpoint")


@pytest.fixture
def files(tmp_path):
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def expected(prompt: list[int], count: int) -> list[int]:
    return tokens_of(prompt, count, VOCAB)


def test_each_line_has_its_output(source, files) -> None:
    input, output = files
    lines = [
        {"prompt": [5, 6], "id": "a", "logprobs": 1},
        "",
        {"prompt": [7], "max_tokens": 2, "temperature": 0.5, "n": 2, "seed": 2**64 - 1, "metadata": {"k": [1]}},
        {"prompt": [0], "custom_id": "refused by the engine", "n": 2},
        "{bad",
        {"messages": [{"role": "user", "content": "he"}], "max_tokens": 1},
        {"prompt": "a" * 100, "id": 5},
        {"prompt": "a", "adapter": "sql"},
        {"prompt": "a", "model": "gpt"},
        {"prompt": "a", "model": source.name, "max_tokens": 1},
        {"messages": [{"role": "user", "content": json.loads("[" * 500 + "]" * 500)}]},
        {"messages": [{"role": "user"}], "chat_template_kwargs": {"chat_template": 5}},
    ]
    result = run(source, write(input, lines), output, token_ids=True)
    found = read(output)
    assert [one["line"] for one in found] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert (result.lines, result.errors, result.done_before) == (11, len([one for one in found if "error" in one]), 0)
    first, second, engine_s, bad, chat, long, adapter, model, own, _, template = found
    assert (first["id"], first["outputs"][0]["token_ids"]) == ("a", expected([5, 6], 4))
    assert first["usage"] == {"prompt_tokens": 2, "completion_tokens": 4}
    assert [set(one) for one in first["outputs"][0]["logprobs"]] == [{"token_id", "token", "logprob", "top"}] * 4
    assert [(one["index"], one["seed"], one["token_ids"]) for one in second["outputs"]] == [
        (0, 2**64 - 1, expected([7], 2)),
        (1, 0, expected([7], 2)),
    ]
    assert second["metadata"] == {"k": [1]}
    assert engine_s == {
        "line": 4,
        "custom_id": "refused by the engine",
        "error": {"message": "token 0 is not for prompts"},
    }
    assert "no JSON" in bad["error"]["message"]
    assert chat["usage"]["prompt_tokens"] == len(byte_level().encode("user:he;").ids)
    assert "max_position_embeddings (64)" in long["error"]["message"]
    assert "adapter is one that the model holds (none); got 'sql'" in adapter["error"]["message"]
    assert f"model is the checkpoint's name ({source.name})" in model["error"]["message"]
    assert "outputs" in own
    assert "error" in template


def test_lines_as_they_come_and_stop_strings(source, files) -> None:
    input, output = files
    text = byte_level().decode(expected([5], 6))
    lines = [{"prompt": [5], "max_tokens": 6}, {"prompt": [5], "max_tokens": 6, "stop": text[2]}]
    engine = FakeEngine(vocab_size=VOCAB)
    run(source, write(input, lines), output, engine, order="finished")
    stopped, whole = read(output)
    assert [stopped["line"], whole["line"]] == [2, 1]
    assert (stopped["outputs"][0]["text"], stopped["outputs"][0]["finish_reason"]) == (text[:2], "stop")
    assert (whole["outputs"][0]["text"], whole["outputs"][0]["finish_reason"]) == (text, "length")
    assert len(engine.canceled) == 1


def test_seeds_are_of_the_run_and_the_line(source, files) -> None:
    input, output = files
    lines = [{"prompt": [5]}, {"prompt": [5]}, {"prompt": [5], "seed": 7}]
    settings = LineSettings(params=SamplingParams(temperature=1.0), max_new_tokens=1)
    run(source, write(input, lines), output, settings=settings)
    whole = output.read_bytes()
    seeds = [one["outputs"][0]["seed"] for one in read(output)]
    assert seeds[2] == 7
    assert len(set(seeds)) == 3, "the same prompt twice is two samples"
    output.write_bytes(whole[: whole.index(b"\n") + 10])  # as a killed process leaves it
    run(source, input, output, settings=settings)
    assert output.read_bytes() == whole
    run(source, input, output.with_name("other.jsonl"), settings=settings)
    assert output.with_name("other.jsonl").read_bytes() != whole, "each run draws its own"


@pytest.mark.parametrize("order", ["input", pytest.param("finished", marks=pytest.mark.full)])
def test_killed_at_fifty_random_points(source, files, order, tmp_path) -> None:
    input, output = files
    run(source, write(input, many_lines(300)), tmp_path / "whole.jsonl", order=order)
    (tmp_path / "checkpoint").symlink_to(source)
    argv = [sys.executable, "-m", "tests.support.batches", str(tmp_path), order, "50", "0"]
    ended = subprocess.run(argv, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["status"] == 0, ended.stderr
    assert told["hits"] >= 25, "most processes were at work when they were killed"
    lines, whole = read(output), read(tmp_path / "whole.jsonl")
    assert len({one["line"] for one in lines}) == len(lines) == len(whole)
    if order == "input":
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(lines, key=lambda one: one["line"]) == sorted(whole, key=lambda one: one["line"])
    assert not list(tmp_path.glob("*.ahead")), "nothing is left of what waited for its turn"


def test_what_came_before_its_turn_is_not_done_again(source, files, monkeypatch) -> None:
    """The first line takes longest; the process ends when all others are done."""
    input, output = files
    lines = [{"prompt": [5], "max_tokens": 20}, *({"prompt": [index], "max_tokens": 1} for index in range(1, 9))]
    write(input, lines)

    class Breaks(FakeEngine):
        def step(self):
            if self.steps == 15:
                raise RuntimeError("killed")
            return super().step()

    with pytest.raises(RuntimeError, match="killed"):
        run(source, input, output, Breaks(vocab_size=VOCAB))
    assert output.read_bytes() == b""
    engine = FakeEngine(vocab_size=VOCAB)
    result = run(source, input, output, engine)
    assert (result.done_before, len(engine.submitted)) == (8, 1)
    assert [one["line"] for one in read(output)] == list(range(1, 10))


def test_lines_far_ahead_wait(source, files, monkeypatch) -> None:
    input, output = files
    monkeypatch.setattr(jaxmoe.batches.run, "WINDOW", 3)
    lines = [{"prompt": [5], "max_tokens": 30}, *({"prompt": [9], "max_tokens": 1} for _ in range(20))]
    engine = FakeEngine(vocab_size=VOCAB)
    most = []
    with Batch(outline(source), write(input, lines), output, settings=LineSettings(max_new_tokens=1)) as batch:
        batch.run(engine, report=lambda read: most.append(read().done if engine.steps < 30 else 0))
    assert 0 < max(most) <= 3
    assert len(read(output)) == 21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": LineSettings(max_new_tokens=5)}, "settings.max_new_tokens was 4 and is 5"),
        ({"order": "finished"}, 'settings.order was "input" and is "finished"'),
        ({"model": {"dtype": "bfloat16"}}, 'model.dtype was "float32" and is "bfloat16"'),
        ({"lines": [{"prompt": [6]}]}, "input.sha256 was "),
        ({"other": True}, "checkpoint.hash was "),
    ],
)
def test_another_run_is_refused(source, files, tmp_path, change, message) -> None:
    input, output = files
    run(source, write(input, [{"prompt": [5]}]), output)
    before = output.read_bytes(), output.with_name("out.jsonl.run.json").read_bytes()
    write(input, change.pop("lines", [{"prompt": [5]}]))
    if change.pop("other", False):
        source = checkpoint(tmp_path / "other")
        (source / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(ValueError, match="Give the same again to go on with it, or another --output") as caught:
        run(source, input, output, **change)
    assert message in str(caught.value)
    # A model is compared after it is loaded, when the record has been replaced by its equal.
    assert (output.read_bytes(), output.with_name("out.jsonl.run.json").read_bytes()) == before or "model" in change


def test_outputs_of_nobody_are_left_alone(source, files) -> None:
    input, output = files
    write(input, [{"prompt": [5]}])
    for text, message in [("hello\n", "no output of this command: line 1"), ('{"line": 1}\n' * 2, "a line twice")]:
        output.write_text(text)
        with pytest.raises(ValueError, match=message):
            run(source, input, output)
        assert output.read_text() == text
    for text in ('{"line": 1}\n', "no line at all"):
        output.write_text(text)
        with pytest.raises(ValueError, match=r"out.jsonl.run.json, which says what it is of, is not"):
            run(source, input, output)
        assert output.read_text() == text
    with pytest.raises(ValueError, match="output is another file than input"):
        run(source, input, input)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        run(source, input.with_name("none.jsonl"), output)
    with pytest.raises(ValueError, match="a prompt on every line; .* has none"):
        run(source, write(input, ["", " "]), output)


def test_two_at_once_are_refused(source, files) -> None:
    input, output = files
    write(input, [{"prompt": [5]}])
    with (
        Batch(outline(source), input, output, settings=LineSettings()),
        pytest.raises(RuntimeError, match="another one is at work on"),
    ):
        run(source, input, output)
    run(source, input, output)


def test_an_output_that_cannot_be_written(source, files, tmp_path) -> None:
    input, _ = files
    write(input, [{"prompt": [5]}])
    with pytest.raises(OSError, match="cannot be written: No such file"):
        Batch(outline(source), input, tmp_path / "none" / "out.jsonl", settings=LineSettings())
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="cannot be written: Is a directory"):
        Batch(outline(source), input, tmp_path / "folder", settings=LineSettings())


@pytest.mark.parametrize("order", ["input", "finished"])
def test_a_disk_that_becomes_full(source, files, order) -> None:
    """The system refuses to let files grow: lines up to there are whole, and the run goes on when there is room."""
    input, output = files
    write(input, [{"prompt": [5, index + 1], "max_tokens": 3, "id": "x" * 200} for index in range(20)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, limits[1]))
        with pytest.raises(
            OSError, match=r"out.jsonl cannot be written, at the output of line \d+: File too large"
        ) as caught:
            run(source, input, output, order=order)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert output.read_bytes().endswith(b"\n")
    assert 3 <= len(read(output)) < 20
    run(source, input, output, order=order)
    assert sorted(one["line"] for one in read(output)) == list(range(1, 21))


def test_a_disk_that_is_full_before_the_work(source, files, monkeypatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    input, output = files
    with pytest.raises(OSError, match="cannot be written: No space left on device"):
        Batch(outline(source), write(input, [{"prompt": [5]}]), output, settings=LineSettings())
    assert not output.exists()
    assert not list(output.parent.glob("*.partial"))


def test_an_input_that_changes_meanwhile(source, files) -> None:
    input, output = files
    write(input, [{"prompt": [5]}])

    class Changes(FakeEngine):
        def step(self):
            write(input, [{"prompt": [6]}])
            return super().step()

    with pytest.raises(ValueError, match="was changed during the run"):
        run(source, input, output, Changes(vocab_size=VOCAB))


def test_the_record(source, files) -> None:
    input, output = files
    run(source, write(input, [{"prompt": [5]}, "{bad"]), output)
    run(source, input, output)
    record = json.loads(output.with_name("out.jsonl.run.json").read_text())
    assert record["input"]["bytes"] == input.stat().st_size
    assert record["model"] == {"dtype": "float32"}
    assert record["finished"] == {"lines": 2, "errors": 1}
    assert [one["lines_done_before"] for one in record["starts"]] == [0, 2]
    assert isinstance(record["seed"], int)


def test_an_output_holds_whole_lines_of_any_text(files, tmp_path) -> None:
    _, output = files
    texts = ["a\u2028b", "\x00\r\n", "é😀" * 30_000]
    record = {"input": {}, "settings": {}, "checkpoint": None}
    with OutputFile(output, {**record, "seed": 1}, "finished") as opened:
        for number, text in enumerate(texts):
            opened.put(number, {"text": text})
    with OutputFile(output, {**record, "seed": 2}, "finished") as opened:
        assert opened.done == {0, 1, 2}
        assert opened.record["seed"] == 1
    assert [json.loads(line)["text"] for line in output.read_bytes().split(b"\n")[:-1]] == texts


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys, monkeypatch) -> None:
    monkeypatch.setattr("jaxmoe.batches.progress.LINE_SECONDS", 0.0)
    with progress(True) as report:
        report(lambda: State(done=1, total=4, errors=1, tokens=10, running=2, slots=8, balance=1.5))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for part in ("1 of 4 lines", "tokens/s", "2 of 8 slots", "busiest device 1.50 of mean", "1 with errors", " left"):
        assert part in lines[0]
    with progress(False) as report:
        report(lambda: pytest.fail("nobody asks"))
    assert capsys.readouterr().err == ""
