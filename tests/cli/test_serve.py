"""``jaxmoe serve``: what it hands on to the server, and what it refuses before a weight is read."""

import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

import jaxmoe
import jaxmoe.serving
from jaxmoe.cli import main

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "a-key-of-some-length"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Calls of `jaxmoe.load` and of the server, in place of both."""
    found = SimpleNamespace(loads=[], serves=[], path=str(tmp_path / "model"), directory=tmp_path)
    shutil.copytree(ROOT / "demo", found.path, ignore=shutil.ignore_patterns("*.safetensors", "traces"))

    def serve(model, bound, **options):
        options["on_start"]("http://here")
        found.serves.append((model, bound.getsockname(), options))

    monkeypatch.delenv("JAXMOE_API_KEY", raising=False)
    monkeypatch.setitem(vars(jaxmoe), "load", lambda path, **options: found.loads.append((path, options)) or "a model")
    monkeypatch.setattr(jaxmoe.serving, "serve", serve)
    return found


def test_options_reach_the_server(started, capsys) -> None:
    argv = ["--port", "0", "--num-slots", "8", "--num-pages", "9", "--max-length", "64", "--max-queue", "0"]
    argv += ["--max-body", "1000", "--drain", "5", "--rebalance", "--no-expert-metrics", "--mesh", "dp=2,tp=2,ep=2"]
    assert main(["serve", started.path, *argv, "--adapter", "sql=path/to/adapter", "--dtype", "bfloat16"]) == 0
    path, options = started.loads[0]
    assert (path, options["adapters"], options["dtype"]) == (started.path, {"sql": "path/to/adapter"}, "bfloat16")
    assert dict(options["mesh"].shape) == {"dp": 2, "tp": 2, "ep": 2}
    model, address, settings = started.serves[0]
    assert (model, address[0]) == ("a model", "127.0.0.1")
    del settings["on_start"], settings["on_compiled"]
    assert settings == {
        "name": "model",
        "keys": [],
        "num_slots": 8,
        "num_pages": 9,
        "max_length": 64,
        "queue": 0,
        "body_bytes": 1000,
        "drain_seconds": 5.0,
        "record": False,
        "rebalance": True,
    }
    assert capsys.readouterr().err == "model is served at http://here/v1\n"


def test_keys_come_from_a_file_or_the_environment(started, monkeypatch) -> None:
    (started.directory / "keys").write_text(f"# who may\n{KEY}\n\n another-key-as-long \n")
    argv = ["serve", started.path, "--host", "0.0.0.0", "--port", "0"]
    assert main([*argv, "--api-key-file", str(started.directory / "keys"), "--name", "mine"]) == 0
    monkeypatch.setenv("JAXMOE_API_KEY", KEY)
    assert main(argv) == 0
    assert [call[2]["keys"] for call in started.serves] == [[KEY, "another-key-as-long"], [KEY]]
    assert [call[2]["name"] for call in started.serves] == ["mine", "model"]


def test_refusals_come_before_the_load(started, capsys, tmp_path, monkeypatch) -> None:
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    (tmp_path / "empty").write_text("# none\n")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        refused = {
            "0.0.0.0 is reached from other machines, so clients need a key": ["--host", "0.0.0.0"],
            f"{tmp_path}/empty has one key a line; it has none": ["--api-key-file", str(tmp_path / "empty")],
            "port is an integer from 0 to 65535; got 80000": ["--port", "80000"],
            "max_length is an integer from 2 to 2048; got 2049": ["--max-length", "2049"],
            f"cannot listen at 127.0.0.1 port {port}: Address already in use": ["--port", port],
        }
        for message, argv in refused.items():
            assert main(["serve", started.path, "--port", "0", *argv]) == 1
            assert message in capsys.readouterr().err
    (started.directory / "model" / "tokenizer.json").unlink()
    assert main(["serve", started.path, "--port", "0"]) == 1
    assert "tokenizer.json" in capsys.readouterr().err
    for argv in (["--drain", "-1"], ["--drain", "nan"]):
        with pytest.raises(SystemExit):
            main(["serve", started.path, *argv])
        assert f"got {argv[1]!r}" in capsys.readouterr().err
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert main(["serve", started.path, "--host", "gpu7"]) == 1
    assert "cannot listen at gpu7 port 8000: Name or service not known" in capsys.readouterr().err
    assert not started.loads
