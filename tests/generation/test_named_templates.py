"""Checkpoints with several chat templates: which one is taken, as in transformers."""

from pathlib import Path
from typing import Any

import pytest

from jaxmoe.generation import Tokenizer
from jaxmoe.generation.prompts import encode_prompts
from tests.support.tokenizers import byte_level, save

USER = [{"role": "user", "content": "x"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
TEXTS = {"default": "plain {{ messages[0].content }}", "tool_use": "tools {{ tools | length }}", "rag": "documents"}


def in_config(directory: Path, names: list[str]) -> Path:
    return save(byte_level(), directory, chat_template=[{"name": name, "template": TEXTS[name]} for name in names])


def in_files(directory: Path, names: list[str]) -> Path:
    save(byte_level(), directory)
    (directory / "additional_chat_templates").mkdir()
    for name in names:
        file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (directory / file).write_text(TEXTS[name])
    return directory


WAYS = [in_config, in_files]
CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "plain x"),
    ({"tools": None}, "plain x"),
    ({"tools": TOOLS}, "tools 1"),
    ({"tools": []}, "tools 0"),
    ({"chat_template": "rag"}, "documents"),
    ({"chat_template": "default", "tools": TOOLS}, "plain x"),
]


@pytest.mark.parametrize("way", WAYS)
def test_tools_choose_their_template(tmp_path, way) -> None:
    tokenizer = Tokenizer.from_directory(way(tmp_path, ["tool_use", "default", "rag"]))
    for variables, expected in CASES:
        assert tokenizer.apply_chat_template(USER, **variables) == expected
    ids = encode_prompts(["x"], lambda: tokenizer, chat=True, chat_template_kwargs={"tools": TOOLS})
    assert ids == [tokenizer.encode("tools 1", add_special_tokens=False)]


@pytest.mark.parametrize("way", WAYS)
def test_tools_without_a_template_of_their_own_go_to_the_default(tmp_path, way) -> None:
    tokenizer = Tokenizer.from_directory(way(tmp_path, ["default", "rag"]))
    assert tokenizer.apply_chat_template(USER, tools=TOOLS) == "plain x"


@pytest.mark.parametrize("way", WAYS)
def test_a_name_that_is_not_there_is_refused(tmp_path, way) -> None:
    tokenizer = Tokenizer.from_directory(way(tmp_path, ["rag", "tool_use"]))
    assert tokenizer.apply_chat_template(USER, tools=TOOLS) == "tools 1"
    for variables, wanted in (({}, "default"), ({"chat_template": "chatml"}, "chatml")):
        with pytest.raises(ValueError, match=rf"templates are rag, tool_use; got no template '{wanted}': name one"):
            tokenizer.apply_chat_template(USER, **variables)


def test_files_come_before_the_config(tmp_path) -> None:
    in_config(tmp_path, ["rag"])
    (tmp_path / "chat_template.jinja").write_text("file")
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.apply_chat_template(USER, tools=TOOLS) == "file"
    with pytest.raises(ValueError, match="templates are default; got no template 'rag'"):
        tokenizer.apply_chat_template(USER, chat_template="rag")


@pytest.mark.parametrize("entry", [7, {"name": "default"}, ["default"], [{"name": "default", "template": 1}]], ids=str)
def test_an_entry_of_another_kind_is_refused(tmp_path, entry) -> None:
    save(byte_level(), tmp_path, chat_template=entry)
    with pytest.raises(ValueError, match=r'a text or a list of \{"name": text, "template": text\}; got '):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize("names", [["tool_use", "default", "rag"], ["default", "rag"], ["default"]], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_choice_is_that_of_transformers(tmp_path, way, names) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(way(tmp_path, names))
    ours = Tokenizer.from_directory(tmp_path)
    for variables, _ in CASES:
        if variables.get("chat_template", "default") in names and len(names) > 1:
            expected = theirs.apply_chat_template(USER, tokenize=False, **variables)
            assert ours.apply_chat_template(USER, **variables) == expected
    assert ours.apply_chat_template(USER, tools=TOOLS) == theirs.apply_chat_template(USER, tools=TOOLS, tokenize=False)
