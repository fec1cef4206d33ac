"""``jaxmoe generate`` through `main`: options, outputs, exit statuses."""

import io
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

import jaxmoe
from jaxmoe.cli import main
from jaxmoe.generation import terminal_text
from jaxmoe.placement import ExpertPlacement
from tests.support.fake_model import FakeConfig, FakeModel, expected
from tests.support.tokenizers import byte_level, save

RUST = byte_level()
VOCAB = 37


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A directory, and `jaxmoe.load` giving a fake model for it; `.loaded` has what it was called with."""
    found = SimpleNamespace(path=str(tmp_path), directory=tmp_path, loaded=[], vocab_size=VOCAB)

    def load(path, *, mesh, **options):
        found.loaded.append({"path": path, "mesh": mesh, **options})
        model = FakeModel(mesh, source=tmp_path, config=FakeConfig(vocab_size=found.vocab_size))
        held = {device.id: 10 for device in mesh.devices.flat}
        model.load_report = SimpleNamespace(expert_bytes_per_device=held, describe=lambda: "held as plain numbers")
        return model

    def read_model_config(path):
        return None, FakeConfig(vocab_size=found.vocab_size)

    monkeypatch.setitem(vars(jaxmoe), "load", load)
    monkeypatch.setattr("jaxmoe.models.read_model_config", read_model_config)
    return found


@pytest.fixture
def with_tokenizer(checkpoint):
    save(RUST, checkpoint.directory, chat_template="{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    checkpoint.vocab_size = RUST.get_vocab_size()
    return checkpoint


def run(capsys, *argv: str) -> SimpleNamespace:
    status = main(["generate", *argv])
    out, err = capsys.readouterr()
    return SimpleNamespace(status=status, out=out, err=err, lines=out.splitlines())


def test_json_for_token_ids(checkpoint, capsys) -> None:
    argv = ["--prompt-ids", "1,2,3", "--prompt-ids", "5", "--max-new-tokens", "6", "--json"]
    result = run(capsys, checkpoint.path, *argv)
    assert result.status == 0
    records = [json.loads(line) for line in result.lines]
    assert [record["prompt"] for record in records] == [[1, 2, 3], [5]]
    assert [record["token_ids"] for record in records] == [expected([1, 2, 3], 6), expected([5], 6)]
    assert {(record["text"], record["finish_reason"]) for record in records} == {(None, "length")}
    assert records[0]["timing"]["generated_tokens"] == 12


def test_the_default_mesh_is_all_devices_on_ep_and_is_told(checkpoint, capsys) -> None:
    result = run(capsys, checkpoint.path, "--prompt-ids", "1", "--max-new-tokens", "2")
    assert dict(checkpoint.loaded[0]["mesh"].shape) == {"dp": 1, "tp": 1, "ep": 8}
    assert result.out == ",".join(map(str, expected([1], 2))) + "\n"
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("mesh dp=1,tp=1,ep=8 on 8 cpu devices: prefill 1 tokens at ")


def test_a_smaller_mesh_is_of_the_first_devices(checkpoint, capsys, monkeypatch) -> None:
    argv = [checkpoint.path, "--prompt-ids", "1", "--max-new-tokens", "2", "--mesh"]
    result = run(capsys, *argv, "tp=2")
    assert checkpoint.loaded[0]["mesh"].devices.flatten().tolist() == jax.devices()[:2]
    assert result.out == ",".join(map(str, expected([1], 2))) + "\n"
    told, summary = result.err.splitlines()
    assert told == "the mesh is of the first 2 of 8 devices; the others stay idle"
    assert summary.startswith("mesh dp=1,tp=2,ep=1 on 2 cpu devices: ")
    larger = run(capsys, *argv, "ep=16")
    assert (larger.status, larger.out) == (1, "")
    assert "dp=1 x tp=1 x ep=16 is 16 devices, but there are 8 (cpu)" in larger.err
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "is 2 devices, but there are 8 (cpu)" in run(capsys, *argv, "tp=2").err


def test_options_reach_the_loader(checkpoint, capsys, tmp_path) -> None:
    placement = ExpertPlacement.round_robin(num_experts=5, ep=2)
    (tmp_path / "placement.json").write_text(placement.to_json())
    argv = ["--mesh", "dp=2,ep=2,tp=2", "--placement", str(tmp_path / "placement.json"), "--dtype", "bfloat16"]
    argv += ["--dispatch", "replicated", "--kernels", "portable", "--check-finite", "--simulate", "8"]
    argv += ["--adapter", "path/to/adapter", "--expert-axes", "ep,tp", "--activations", "checkpoint"]
    assert run(capsys, checkpoint.path, "--prompt-ids", "1", "--max-new-tokens", "1", *argv).status == 0
    (loaded,) = checkpoint.loaded
    assert dict(loaded.pop("mesh").shape) == {"dp": 2, "tp": 2, "ep": 2}
    assert loaded == {
        "path": checkpoint.path,
        "placement": placement,
        "dtype": "bfloat16",
        "quantized": None,
        "activations": "checkpoint",
        "adapter": "path/to/adapter",
        "mtp": False,
        "adapters": None,
        "expert_axes": ("ep", "tp"),
        "dispatch": "replicated",
        "kernels": "portable",
        "progress": False,
        "check_finite": True,
    }


def test_speculation_loads_what_it_needs(checkpoint, capsys) -> None:
    result = run(capsys, checkpoint.path, "--prompt-ids", "1", "--speculate", "mtp")
    assert (result.status, checkpoint.loaded[0]["mtp"]) == (1, True)
    assert "this model has none; load it with mtp=True" in result.err  # the fake has no such layers


def test_text_prompts(with_tokenizer, capsys) -> None:
    argv = ["--prompt", "he", "--prompt", "she", "--max-new-tokens", "5", "--ignore-eos"]
    result = run(capsys, with_tokenizer.path, *argv, "--json")
    records = [json.loads(line) for line in result.lines]
    assert [record["prompt"] for record in records] == ["he", "she"]
    for record in records:
        assert record["text"] == RUST.decode(record["token_ids"])
    plain = run(capsys, with_tokenizer.path, *argv)
    assert plain.out == "".join(f"[{i}] {record['prompt']}\n{record['text']}\n" for i, record in enumerate(records))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "-"])
def test_prompts_from_a_file_or_stdin(with_tokenizer, capsys, monkeypatch, tmp_path, name) -> None:
    texts = ["he\u2028", "a b", "x"]
    content = "\n\n".join(json.dumps({"prompt": text}) if name.endswith("l") else text for text in texts)
    monkeypatch.setattr(sys, "stdin", io.StringIO(content))
    (tmp_path / name).write_text(content) if name != "-" else None
    source = name if name == "-" else str(tmp_path / name)
    argv = ["--prompt-file", source, "--max-new-tokens", "2", "--json", "--batch-size", "2"]
    result = run(capsys, with_tokenizer.path, *argv)
    records = [json.loads(line) for line in result.lines]
    assert [record["prompt"] for record in records] == texts
    assert [record["timing"]["prompts"] for record in records] == [2, 2, 1]


def test_a_prompt_from_stdin(with_tokenizer, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines"))
    result = run(capsys, with_tokenizer.path, "--prompt", "-", "--max-new-tokens", "2", "--json")
    assert json.loads(result.out)["prompt"] == "two\nlines"


def test_chat(with_tokenizer, capsys) -> None:
    argv = ["--max-new-tokens", "3", "--json"]
    chat = run(capsys, with_tokenizer.path, "--prompt", "Hi", "--chat", "--system", "Be kind.", *argv)
    same = run(capsys, with_tokenizer.path, "--prompt", "system:Be kind.;user:Hi;", *argv)
    assert json.loads(chat.out)["token_ids"] == json.loads(same.out)["token_ids"]
    assert json.loads(chat.out)["prompt"] == "Hi"


def test_one_prompt_on_a_terminal_is_streamed(with_tokenizer, capsys, monkeypatch) -> None:
    argv = ["--prompt", "he", "--max-new-tokens", "20"]
    piped = run(capsys, with_tokenizer.path, *argv)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run(capsys, with_tokenizer.path, *argv).out == terminal_text(piped.out)
    ids = ["--prompt-ids", "1,2", "--max-new-tokens", "3"]
    (with_tokenizer.directory / "tokenizer.json").unlink()
    assert run(capsys, with_tokenizer.path, *ids).out.count(",") == 2


def test_seed_and_stop(with_tokenizer, capsys) -> None:
    argv = ["--prompt", "he", "--max-new-tokens", "12", "--temperature", "9", "--seed", "5", "--json"]
    first, second = (json.loads(run(capsys, with_tokenizer.path, *argv).out) for _ in range(2))
    assert first["token_ids"] == second["token_ids"]
    letter = next(letter for letter in first["text"] if letter.isalnum())
    stopped = json.loads(run(capsys, with_tokenizer.path, *argv, "--stop", letter, "--stop", "@@").out)
    assert (stopped["text"], stopped["finish_reason"]) == (first["text"].split(letter)[0], "stop")


def test_settings_without_effect_are_told(checkpoint, capsys) -> None:
    argv = ["--prompt-ids", "1", "--max-new-tokens", "1", "--top-p", "0.9"]
    assert "without effect: top_p; the likeliest token is taken" in run(capsys, checkpoint.path, *argv).err
    assert "without effect" not in run(capsys, checkpoint.path, *argv, "--temperature", "1").err


def test_verbose_shows_what_each_device_holds(checkpoint, capsys) -> None:
    result = run(capsys, checkpoint.path, "--prompt-ids", "1", "--max-new-tokens", "1", "-v")
    assert "Expert weights per device" in result.err
    assert "12.5%" in result.err


ERRORS = {
    "no prompt file": (["--prompt-file", "nowhere.txt"], "the prompt file nowhere.txt does not exist"),
    "empty prompt file": (["--prompt-file", "{dir}/empty"], "empty has none"),
    "bad jsonl": (["--prompt-file", "{dir}/bad.jsonl"], "bad.jsonl:2 is no JSON"),
    "jsonl without prompt": (["--prompt-file", "{dir}/other.jsonl"], 'an object with "prompt"; {dir}/other.jsonl:1'),
    "binary": (["--prompt-file", "{dir}/binary"], "is UTF-8 text"),
    "no tokenizer": (["--prompt", "text"], "text prompts need the checkpoint's tokenizer.json"),
    "stop without tokenizer": (["--prompt-ids", "1", "--stop", "x"], "tokenizer.json"),
    "outside vocabulary": (["--prompt-ids", "1,37"], "token ids are 0 to 36 (vocab_size 37); prompt 0 has 37"),
    "too long": (["--prompt-ids", "1", "--max-new-tokens", "512"], "ask for at most 511 new tokens"),
    "bad setting": (["--prompt-ids", "1", "--temperature", "-1"], "temperature is at least 0"),
    "bad seed": (["--prompt-ids", "1", "--seed", "-1"], "seed is an integer from 0"),
    "empty stop": (["--prompt-ids", "1", "--stop", ""], "a stop string is a text of at least one character"),
    "no folder for routing": (
        ["--prompt-ids", "1", "--record-routing", "nowhere/r.npz"],
        "the directory of --record-routing nowhere/r.npz does not exist",
    ),
    "mesh size": (["--prompt-ids", "1", "--mesh", "tp=16"], "is 16 devices, but there are 8"),
    "simulate too late": (["--prompt-ids", "1", "--simulate", "3"], "devices are simulated before JAX starts"),
    "no placement file": (["--prompt-ids", "1", "--placement", "x.json"], "the placement file x.json does not exist"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_in_the_input_is_one_line_and_status_1(checkpoint, capsys, case) -> None:
    directory = checkpoint.directory
    (directory / "empty").write_text("\n \n")
    (directory / "bad.jsonl").write_text('{"prompt": "a"}\nnot json\n')
    (directory / "other.jsonl").write_text('{"text": "a"}\n')
    (directory / "binary").write_bytes(b"\xff\xfe\x00")
    before = sorted(directory.iterdir())
    argv, message = ERRORS[case]
    argv = [one.replace("{dir}", str(directory)) for one in argv]
    result = run(capsys, checkpoint.path, *argv)
    assert result.status == 1
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("jaxmoe: error: ")
    assert message.replace("{dir}", str(directory)) in line
    assert sorted(directory.iterdir()) == before
    assert not checkpoint.loaded  # which may take minutes


def test_a_message_of_several_lines_becomes_one(checkpoint, capsys, monkeypatch) -> None:
    def load(*_, **__):
        raise ValueError("two problems:\n  - one\n  - two")

    monkeypatch.setitem(vars(jaxmoe), "load", load)
    assert run(capsys, checkpoint.path, "--prompt-ids", "1").err == "jaxmoe: error: two problems: - one - two\n"


def test_debug_shows_the_traceback(checkpoint) -> None:
    with pytest.raises(ValueError, match="prompt 0 has 37"):
        main(["generate", checkpoint.path, "--prompt-ids", "37", "--debug"])


def test_a_bug_is_not_dressed_up_as_bad_input(checkpoint, monkeypatch) -> None:
    monkeypatch.setitem(vars(jaxmoe), "load", lambda *_, **__: None)
    with pytest.raises(TypeError, match="got NoneType"):
        main(["generate", checkpoint.path, "--prompt-ids", "1"])


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["unknown"],
        ["generate"],
        ["generate", "dir"],
        ["generate", "dir", "--prompt", "a", "--prompt-ids", "1"],
        ["generate", "dir", "--prompt-ids", "1,x"],
        ["generate", "dir", "--prompt", "a", "--mesh", "xp=2"],
        ["generate", "dir", "--prompt", "a", "--simulate", "0"],
        ["generate", "dir", "--prompt", "a", "--system", "b"],
        ["generate", "dir", "--prompt-ids", "1", "--chat"],
        ["generate", "dir", "--prompt-ids", "1", "--num-drafts", "2"],
        ["generate", "dir", "--prompt-ids", "1", "--speculate", "mtp", "--temperature", "0.5"],
    ],
)
def test_wrong_usage_is_status_2(argv, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("usage: jaxmoe")


def test_help_needs_no_jax() -> None:
    code = (
        "import sys\nfrom jaxmoe.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as error: assert error.code == 0\n"
        "assert not {'jax', 'numpy', 'rich', 'tokenizers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--prompt-ids 5,6,7" in done.stdout


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "jaxmoe", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"jaxmoe {jaxmoe.__version__}"
