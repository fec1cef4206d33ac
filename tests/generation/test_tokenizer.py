"""Tokenizer files, chat templates, and parity with transformers where it is installed."""

import json

import pytest

from jaxmoe.generation import Tokenizer
from jaxmoe.generation.chat import ChatTemplate
from jaxmoe.generation.tokenizer import tokenizer_of
from tests.support.tokenizers import byte_fallback, byte_level, save

CHATML = """\
{%- if messages[0].role != "system" %}
    {{- bos_token }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ["system", "user", "assistant"] %}
        {{- raise_exception("unknown role " + message.role) }}
    {%- endif %}
    {{- "<|start|>" + message.role + "\\n" }}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {{- "<|end|>\\n" }}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- "<|start|>assistant\\n" }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ "<no thinking>" }}{% endif %}
{%- endif %}
"""
# The quirks of whitespace control, loop controls, namespaces and filters that published templates rely on.
QUIRKS = """
{% set ns = namespace(last=-1) %}
{% for message in messages %}
    {% if message.role == 'tool' %}{% continue %}{% endif %}
  {% set ns.last = loop.index0 %}
{{ message.role }}: {{ message.content | tojson(indent=2) }} {{ loop.first }}
    {% if loop.index0 == 2 %}{% break %}{% endif %}
{% endfor %}
last={{ ns.last }} {{ messages[::-1] | map(attribute='role') | join(',') }} {{ dict(a=1) | items | list }}
{{ eos_token }}{{ messages[0]['content'].split('e')[-1] }}
"""
CHATS = [
    [{"role": "user", "content": " Hello, <world> & 'you' — é "}],
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": ""},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 3,
]


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize("bos", [False, True])
def test_text_there_and_back(tmp_path, make, bos) -> None:
    tokenizer = Tokenizer.from_directory(save(make(bos=bos), tmp_path))
    ids = tokenizer.encode("a b héé 中")
    assert tokenizer.decode(ids) == "a b héé 中"
    start = make().token_to_id("<|start|>")
    assert (ids[0] == start) == bos
    assert tokenizer.encode("a b héé 中", add_special_tokens=False) == ids[bos:]


def test_prompts_are_neither_cut_nor_padded(tmp_path) -> None:
    rust = byte_level()
    rust.enable_truncation(4)
    rust.enable_padding(length=10)
    tokenizer = Tokenizer.from_directory(save(rust, tmp_path))
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert len(tokenizer.encode("ab")) == 2


def test_missing_and_broken_files(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"need the checkpoint's tokenizer.json, .* --prompt-ids"):
        tokenizer_of(tmp_path)
    save(byte_level(), tmp_path)
    assert tokenizer_of(tmp_path) is tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json is not readable as a tokenizer"):
        tokenizer_of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(ValueError, match=r"tokenizer.json is not readable as a tokenizer: .*git lfs pull"):
        tokenizer_of(tmp_path)
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json holds one JSON object; got list"):
        Tokenizer.from_directory(tmp_path)


def test_where_a_template_is_found(tmp_path) -> None:
    user = [{"role": "user", "content": "x"}]
    with pytest.raises(ValueError, match=r"neither chat_template\.jinja nor"):
        Tokenizer.from_directory(save(byte_level(), tmp_path)).apply_chat_template(user)
    save(byte_level(), tmp_path, chat_template="config")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(user) == "config"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    save(byte_level(), tmp_path, chat_template=several)
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(user) == "default"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_directory(tmp_path).apply_chat_template(user) == "file"
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ValueError, match="no valid Jinja"):
        Tokenizer.from_directory(tmp_path)


def test_special_tokens_and_variables() -> None:
    template = ChatTemplate(CHATML, {"bos_token": "<s>"})
    text = template.render([{"role": "user", "content": " hi "}], enable_thinking=False)
    assert text == "<s><|start|>user\nhi<|end|>\n<|start|>assistant\n<no thinking>"
    text = template.render([{"role": "user", "content": "hi"}], add_generation_prompt=False)
    assert text == "<s><|start|>user\nhi<|end|>\n"


def test_a_template_can_refuse() -> None:
    with pytest.raises(ValueError, match="the chat template refused the messages: unknown role pirate"):
        ChatTemplate(CHATML).render([{"role": "pirate", "content": ""}])
    for messages in ([], [{"content": "no role"}], ["text"]):
        with pytest.raises(ValueError, match="message"):
            ChatTemplate(CHATML).render(messages)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__name__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(__class__=1) }}",
        "{{ '%s' | format(messages.__class__.__base__) }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(attack) -> None:
    with pytest.raises(ValueError, match="refused"):
        ChatTemplate(attack).render([{"role": "user", "content": ""}])


def test_a_template_sees_plain_data_only() -> None:
    class Secret:
        value = 1

    text = ChatTemplate("{{ thing }} {{ thing.value is defined }}").render(
        [{"role": "user", "content": ""}], thing=Secret()
    )
    assert text == "<Secret> False"


@pytest.mark.parity
@pytest.mark.parametrize("source", [CHATML, QUIRKS])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_templates_render_as_in_transformers(tmp_path, source, messages, add_generation_prompt) -> None:
    transformers = pytest.importorskip("transformers")
    save(byte_level(bos=True), tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_directory(tmp_path)
    tools = [{"type": "function", "function": {"name": "f", "description": "<é>", "parameters": {}}}]
    for extra in ({}, {"tools": tools}, {"enable_thinking": False}):
        text = ours.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **extra)
        assert text == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **extra
        )
    assert ours.encode(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == theirs(text)["input_ids"]


def test_json_filter_keeps_html_and_unicode() -> None:
    content = '<a href="x">é</a>'
    text = ChatTemplate("{{ messages[0].content | tojson }}").render([{"role": "user", "content": content}])
    assert text == json.dumps(content, ensure_ascii=False)
