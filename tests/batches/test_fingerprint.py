"""The hash of a checkpoint sees what it says that it covers."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmoe.batches import fingerprint
from jaxmoe.batches.fingerprint import checkpoint_hash


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """Weights of some 100 kB, of which samples of 100 bytes are read."""
    monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "SAMPLE_BYTES", 100)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("a")
    save_file({"a": np.zeros(25_000, np.float32)}, tmp_path / "model.safetensors")
    return tmp_path


def test_it_depends_on_the_content_alone(checkpoint, tmp_path_factory) -> None:
    before = checkpoint_hash(checkpoint)
    moved = checkpoint.rename(tmp_path_factory.mktemp("moved") / "there")
    (moved / ".lock").write_text("hidden")
    (moved / "config.json").touch()
    assert checkpoint_hash(moved) == before


@pytest.mark.parametrize("change", ["header", "first", "last", "size", "small file", "template", "name", "new file"])
def test_what_it_sees(checkpoint, change) -> None:
    before = checkpoint_hash(checkpoint)
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if change == "header":
        data[data.index(b'"a"') + 1] = ord("b")
    elif change == "first":
        data[90] ^= 1  # within the first sample
    elif change == "last":
        data[-1] = 1
    elif change == "size":
        data.append(0)
    weights.write_bytes(data)
    template = checkpoint / "additional_chat_templates" / "tools.jinja"
    if change == "small file":
        (checkpoint / "config.json").write_text("{ }")
    elif change == "template":
        template.write_text("b")
    elif change == "name":
        (checkpoint / "config.json").rename(checkpoint / "other.json")
    elif change == "new file":
        (checkpoint / "tokenizer.json").write_text("")
    assert checkpoint_hash(checkpoint) != before


def test_what_it_does_not_see(checkpoint) -> None:
    """As its docstring says: bytes between the samples."""
    before = checkpoint_hash(checkpoint)
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[3000] ^= 1
    weights.write_bytes(data)
    assert checkpoint_hash(checkpoint) == before
