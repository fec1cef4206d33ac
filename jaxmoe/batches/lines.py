"""Lines of an input file: JSON objects with a prompt and settings, or OpenAI's batch format."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxmoe.batches.settings import NAMES, LineSettings, read_settings
from jaxmoe.generation.prompts import Prompt

# Fields of a line that go to its output as they are.
CARRIED = ("id", "custom_id", "metadata")
_PROMPTS = ("prompt", "messages")
_OPENAI = {"custom_id", "method", "url", "body", "metadata"}
_URLS = {"/v1/chat/completions": "messages", "/v1/completions": "prompt"}


class RawLine(NamedTuple):
    """A line of the file that is not blank, with its number from 1."""

    number: int
    text: bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line that was understood.

    Attributes:
        carried: fields that go to its output as they are.
        prompt: text, token ids or messages.
        settings: everything that decides its text.
        tools: tools for the chat template; None for none.
        model: name of the model that it asks for; None where it names none.
    """

    carried: dict[str, Any]
    prompt: Prompt
    settings: LineSettings
    tools: list[Any] | None = None
    model: str | None = None


class LineError(ValueError):
    """A line cannot be done.

    Attributes:
        carried: fields that go to its output as they are, as far as the line could be read.
    """

    def __init__(self, message: str, carried: dict[str, Any]):
        super().__init__(message)
        self.carried = carried


def raw_lines(path: Path) -> Iterator[RawLine]:
    """The lines of a file that are not blank."""
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield RawLine(number, text)


def read_line(text: bytes, defaults: LineSettings) -> Line:
    """Understand a line.

    Args:
        text: the line.
        defaults: settings where it says nothing else.

    Raises:
        LineError: it is no JSON object, has an unknown field, no prompt or two, or a setting that is out of range.

    Example:
        >>> line = read_line(b'{"prompt": "Hi", "max_tokens": 5, "id": 7}', LineSettings())
        >>> line.prompt, line.settings.max_new_tokens, line.carried
        ('Hi', 5, {'id': 7})
    """
    carried: dict[str, Any] = {}
    try:
        given = _parse(text)
        carried.update((name, given[name]) for name in CARRIED if name in given)
        body = _body(given) if "body" in given else {k: v for k, v in given.items() if k not in CARRIED}
        return _read_body(body, carried, defaults)
    except LineError:
        raise
    except ValueError as error:
        raise LineError(str(error), carried) from error


def _parse(text: bytes) -> dict[str, Any]:
    try:
        given = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_pairs, parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise ValueError(f"a line is UTF-8 text; {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"a line is a JSON object; this is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("a line is a JSON object; this one is nested too deeply") from error
    if not isinstance(given, dict):
        raise ValueError(f"a line is a JSON object; got {type(given).__name__}")
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"texts are of whole characters; one has half a surrogate pair: {error.reason}") from error
    return given


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise ValueError(f"a field is given once; {name!r} is {found[name]!r:.40} and {value!r:.40}")
        found[name] = value
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"numbers of JSON are finite; got {text}")


def _body(given: dict[str, Any]) -> dict[str, Any]:
    """The request in a line of OpenAI's batch format."""
    if unknown := given.keys() - _OPENAI:
        raise ValueError(
            f'a line with "body" has {", ".join(sorted(_OPENAI))} beside it; got {min(unknown)!r}: move it into the body'
        )
    body, url, method = given["body"], given.get("url"), given.get("method", "POST")
    if not isinstance(body, dict):
        raise ValueError(f'"body" is an object; got {body!r:.80}')
    if method != "POST":
        raise ValueError(f'"method" is "POST", or left out; got {method!r:.80}')
    if url is not None:
        if url not in _URLS:
            raise ValueError(f'"url" is one of {", ".join(_URLS)}, or left out; got {url!r:.80}')
        if _URLS[url] not in body:
            raise ValueError(f'a body for {url} has "{_URLS[url]}"; this one has not')
    if body.get("stream"):
        raise ValueError("a file is not streamed; leave stream out")
    return {name: value for name, value in body.items() if name not in ("stream", "user")}


def _read_body(body: dict[str, Any], carried: dict[str, Any], defaults: LineSettings) -> Line:
    if unknown := body.keys() - {*NAMES, *_PROMPTS, "tools", "model"}:
        raise ValueError(
            f"there is no field {min(unknown)!r}: a line has prompt or messages, settings ({', '.join(sorted(NAMES))}), "
            "tools and model; other data goes under metadata"
        )
    prompts = [name for name in _PROMPTS if body.get(name) is not None]
    if len(prompts) != 1:
        raise ValueError(f"a line has one of prompt and messages; got {' and '.join(prompts) or 'neither'}")
    prompt, tools, model = body[prompts[0]], body.get("tools"), body.get("model")
    settings = read_settings(body, defaults)
    if isinstance(prompt, str) and settings.chat:
        system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
        prompt = [*system, {"role": "user", "content": prompt}]
    is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    if prompts[0] == "messages" and not is_chat:
        raise ValueError(f"messages is a list of objects with role and content; got {prompt!r:.80}")
    for name in ("tools", "chat_template_kwargs"):
        if body.get(name) is not None and not is_chat:
            raise ValueError(f"{name} is for the chat template: it goes with messages")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools is a list of objects; got {tools!r:.80}")
    if model is not None and not isinstance(model, str):
        raise ValueError(f"model is a name; got {model!r:.80}")
    return Line(carried=carried, prompt=prompt, settings=settings, tools=tools or None, model=model)
