"""Calls of tools in what a model writes: the forms that chat templates ask for, and the reader that takes them out."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxmoe.generation.detokenize import possible_start

BEGIN, END = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A call of a tool.

    Attributes:
        name: name of the tool.
        arguments: JSON object of its arguments.
    """

    name: str
    arguments: str


class CallForm(NamedTuple):
    """A form of calls between ``<tool_call>`` and ``</tool_call>``.

    Attributes:
        name: name of the form.
        asked: pattern that is found in the chat templates that ask for it.
        read: function from the text between the two tags, and the parameters of each tool by name, to the call; it raises
            ValueError where the text is none.
    """

    name: str
    asked: re.Pattern[str]
    read: Callable[[str, Mapping[str, Any]], ToolCall]


def form_of(template: str) -> CallForm | None:
    r"""Find the form of calls that a chat template asks for; None where it asks for none that is known.

    Example:
        >>> form_of('... <tool_call>\n{"name": ..., "arguments": ...}\n</tool_call>').name
        'JSON'
        >>> form_of("{{ messages[0].content }}")
    """
    return next((form for form in FORMS if form.asked.search(template)), None)


class CallReader:
    """Takes the calls out of a text as it comes; what is no call passes as it is.

    White space before and after calls is left out. A call that cannot be read passes as text, and so does one that the text
    ends in.

    Args:
        form: form of the calls.
        tools: tools as a request gives them, ``{"type": "function", "function": {"name": ..., "parameters": ...}}``.

    Attributes:
        calls: number of calls so far.

    Example:
        >>> reader = CallReader(form_of('<tool_call>{"name"'), [])
        >>> reader.push("I look. <tool")
        ('I look.', [])
        >>> reader.push('_call>{"name": "look", "arguments": {"at": 5}}</tool_call>')
        ('', [ToolCall(name='look', arguments='{"at": 5}')])
    """

    def __init__(self, form: CallForm, tools: Sequence[Mapping[str, Any]]):
        functions = [tool["function"] for tool in tools]
        self._parameters = {function["name"]: function.get("parameters") for function in functions}
        self._form = form
        self._held, self._spaces, self._inside = "", "", False
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Add text, and return the text and the calls that are certain now."""
        self._held += text
        shown, calls = "", list[ToolCall]()
        while True:
            before, tag, behind = self._held.partition(END if self._inside else BEGIN)
            if not tag:
                break
            self._held = behind
            if not self._inside:
                shown += self._show(before)
            elif (call := self._read(before)) is None:
                shown += self._show(BEGIN + before + END)
            else:
                self._spaces = ""
                calls.append(call)
            self._inside = not self._inside
        if not self._inside:
            certain = len(self._held) - possible_start(self._held, (BEGIN,))
            shown += self._show(self._held[:certain])
            self._held = self._held[certain:]
        self.calls += len(calls)
        return shown, calls

    def finish(self) -> str:
        """Return what was held back and turned out to be no call."""
        rest = (BEGIN if self._inside else "") + self._held
        text = self._spaces + rest if rest or not self.calls else ""
        self._held, self._spaces, self._inside = "", "", False
        return text

    def _show(self, text: str) -> str:
        """Let text pass, but for white space at its end, which may stand before a call."""
        text = self._spaces + text
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        return shown

    def _read(self, text: str) -> ToolCall | None:
        try:
            return self._form.read(text.strip(), self._parameters)
        except ValueError:
            return None


def _read_json(text: str, parameters: Mapping[str, Any]) -> ToolCall:
    del parameters
    value = json.loads(text)
    match value:
        case {"name": str(name), "arguments": dict(arguments)}:
            return ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    raise ValueError(f"a call is an object with a name and arguments; got {value!r:.80}")


def _read_function_tags(text: str, parameters: Mapping[str, Any]) -> ToolCall:
    found = re.fullmatch(r"<function=([\w.-]+)>(.*)</function>", text, re.DOTALL)
    if found is None:
        raise ValueError(f"a call is <function=NAME>...</function>; got {text!r:.80}")
    given = re.findall(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", found[2], re.DOTALL)
    return _call(found[1], given, parameters)


def _read_argument_tags(text: str, parameters: Mapping[str, Any]) -> ToolCall:
    found = re.fullmatch(r"([\w.-]+)\s*((?:<arg_key>.*</arg_value>)?)", text, re.DOTALL)
    if found is None:
        raise ValueError(f"a call is NAME<arg_key>...</arg_key><arg_value>...</arg_value>; got {text!r:.80}")
    given = re.findall(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", found[2], re.DOTALL)
    return _call(found[1], given, parameters)


def _call(name: str, given: Sequence[tuple[str, str]], parameters: Mapping[str, Any]) -> ToolCall:
    """A call whose values are plain text where the tool wants text, and JSON elsewhere."""
    match parameters.get(name):
        case {"properties": dict(properties)}:
            pass
        case _:
            properties = {}
    arguments = {key.strip(): _value(text, properties.get(key.strip())) for key, text in given}
    return ToolCall(name, json.dumps(arguments, ensure_ascii=False))


def _value(text: str, schema: Any) -> Any:
    types = _types(schema)
    if not types or "string" in types:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _types(schema: Any) -> set[str]:
    """The types that a JSON schema allows, as far as it names them."""
    match schema:
        case {"type": str(one)}:
            return {one}
        case {"type": list(several)}:
            return {one for one in several if isinstance(one, str)}
        case {"anyOf": list(schemas)} | {"oneOf": list(schemas)}:
            return {one for each in schemas for one in _types(each)}
    return set()


# Newlines and quotes are escaped in the templates that have them in a text of Jinja.
_GAP = r"(?:\\n|\s)*"
FORMS = (
    CallForm("function tags", re.compile(rf"{BEGIN}{_GAP}<function="), _read_function_tags),
    CallForm("argument tags", re.compile(rf"{BEGIN}[^<]*<arg_key>"), _read_argument_tags),
    CallForm("JSON", re.compile(rf'{BEGIN}{_GAP}\{{\\?"name\\?"'), _read_json),
)
