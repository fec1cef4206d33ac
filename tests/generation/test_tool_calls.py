"""Calls of tools are taken out of a text, however it comes in pieces; all that is no call passes unchanged."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.generation.tool_calls import FORMS, CallReader, form_of
from tests.support.runs import examples

TOOLS = [
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "at": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                    "for": {"type": ["string", "null"]},
                    "in": {"type": "array"},
                },
            },
        },
    },
]
ARGUMENTS = {"at": 5, "for": "12", "as": 'é\n"x"', "in": ["a", {"b": None}]}
# What a template says to the model, and the two calls, of `look` and of `now`, as a model writes them.
ASKED = {
    "JSON": (
        r'{{ "within tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call>" }}',
        "<tool_call>\n" + json.dumps({"name": "look", "arguments": ARGUMENTS}) + "\n</tool_call>",
        '<tool_call>{"arguments": {}, "name": "now"}</tool_call>',
    ),
    "function tags": (
        "<tool_call>\n<function=example>\n<parameter=one>\nvalue\n</parameter>\n</function>\n</tool_call>",
        '<tool_call>\n<function=look>\n<parameter=at>\n5\n</parameter>\n<parameter=for>\n12\n</parameter>\n<parameter=as>\né\n"x"\n</parameter>\n'
        '<parameter=in>\n["a", {"b": null}]\n</parameter>\n</function>\n</tool_call>',
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "argument tags": (
        "<tool_call>{function-name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>",
        "<tool_call>look\n<arg_key>at</arg_key>\n<arg_value>5</arg_value>\n<arg_key>for</arg_key>\n"
        '<arg_value>12</arg_value><arg_key>as</arg_key><arg_value>é\n"x"</arg_value>'
        '<arg_key>in</arg_key><arg_value>["a", {"b": null}]</arg_value>\n</tool_call>',
        "<tool_call>now</tool_call>",
    ),
}


def read(form: str, pieces) -> tuple[str, list[tuple[str, dict]]]:
    """The text and the calls of a text that comes in pieces."""
    reader = CallReader(form_of(ASKED[form][0]), TOOLS)
    shown, calls = "", []
    for piece in pieces:
        text, found = reader.push(piece)
        shown, calls = shown + text, calls + found
    shown += reader.finish()
    assert reader.calls == len(calls)
    return shown, [(call.name, json.loads(call.arguments)) for call in calls]


def test_templates_ask_for_a_form_by_its_text() -> None:
    assert {form.name for form in FORMS} == ASKED.keys()
    for name, (template, *_) in ASKED.items():
        assert form_of(template).name == name
    for template in ("{{ tools }}", "<tool_call>name<tool_sep>\n<arg_key>a</arg_key>", "[TOOL_CALLS]"):
        assert form_of(template) is None


@pytest.mark.parametrize("form", ASKED)
@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_calls_are_taken_out_of_the_text(form, size) -> None:
    _, look, now = ASKED[form]
    text = f"I look.\n\n{look}\n{now}\n"
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert read(form, pieces) == ("I look.", [("look", ARGUMENTS), ("now", {})])
    assert read(form, [look, " and ", now]) == (" and", [("look", ARGUMENTS), ("now", {})])


@pytest.mark.parametrize("form", ["function tags", "argument tags"])
def test_text_of_a_value_is_told_by_the_tool(form) -> None:
    look = ASKED[form][1].replace('["a", {"b": null}]', "[a").replace("look", "other")
    (_, arguments), *none = read(form, [look])[1]
    assert not none
    assert arguments == {**ARGUMENTS, "at": "5", "in": "[a"}, "nobody says what other takes"
    (_, arguments), *_ = read(form, [look.replace("other", "look")])[1]
    assert arguments["in"] == "[a", "what is no JSON is text"


BROKEN = [
    "<tool_call>",
    "<tool_call>{</tool_call>",
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "look", "arguments": []}</tool_call> ',
    "<tool_call><function=look></tool_call>",
    "<tool_call>look<arg_key>a</tool_call>",
    "a <tool_ca",
    " \n",
]


@pytest.mark.parametrize("form", ASKED)
@pytest.mark.parametrize("broken", [1, 2, 3, 4, 5])
def test_a_call_that_is_none_stays_in_the_text(form, broken) -> None:
    text = f"a {BROKEN[broken]} b"
    assert read(form, [text]) == (text, [])


@pytest.mark.parametrize("form", ASKED)
@settings(max_examples=examples(30, 200))
@given(data=st.data())
def test_what_is_no_call_passes_as_it_is(form, data) -> None:
    words = [*BROKEN, "</tool_call>", "<", "tool", "é", "\n", " ", '{"a": 1}']
    text = "".join(data.draw(st.lists(st.sampled_from(words), max_size=8), "text"))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6), "cuts"))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, calls = read(form, pieces)
    assert read(form, [text]) == (shown, calls), "the pieces make no difference"
    if not calls:
        assert shown == text
