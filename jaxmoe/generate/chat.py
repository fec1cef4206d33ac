"""Chat templates: messages to one prompt text, by the Jinja template that comes with a checkpoint."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

Message = Mapping[str, Any]


class ChatTemplate:
    """One checkpoint's template.

    A template is a program from the internet. It runs in Jinja's immutable sandbox and is given
    plain JSON data only, never the caller's own objects.

    Args:
        source: the template's text.
        variables: what it may use besides the messages: ``bos_token``, ``eos_token`` and so on.

    Raises:
        ValueError: the text is no valid template.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
        >>> template.render([{"role": "user", "content": "Hi"}])
        '<user>Hi'
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None):
        self.source = source
        self._variables = dict(variables or {})
        # A broken template is reported when the tokenizer is read, not in the middle of a chat.
        _ = self._template

    @classmethod
    def from_directory(cls, directory: Path, tokenizer_config: Mapping[str, Any]) -> "ChatTemplate | None":
        """The template of a checkpoint: ``chat_template.jinja``, or what ``tokenizer_config.json`` holds.

        Returns:
            None where there is neither. Of several named templates, the one named "default".
        """
        file = directory / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else tokenizer_config.get("chat_template")
        if isinstance(source, list):
            named = {entry["name"]: entry["template"] for entry in source}
            if "default" not in named:
                raise ValueError(f'one of several chat templates is named "default"; there are {sorted(named)}')
            source = named["default"]
        return None if source is None else cls(source, special_tokens(tokenizer_config))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt text of a conversation.

        Args:
            messages: dictionaries with "role" and "content", oldest first.
            add_generation_prompt: end with what opens the assistant's turn.
            variables: more for the template, such as ``enable_thinking=False`` or ``tools=[...]``.

        Raises:
            ValueError: no messages, or the template refused them.
        """
        if not messages:
            raise ValueError("a conversation has at least one message; got none")
        for message in messages:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f'a message is a dictionary with "role" and "content"; got {message!r}')
        given = {"tools": None, "documents": None, **self._variables, **_plain(variables)}
        try:
            return self._template.render(
                messages=_plain(messages), add_generation_prompt=add_generation_prompt, **given
            )
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error

    @cached_property
    def _template(self) -> Any:
        try:
            return _environment().from_string(self.source)
        except TemplateError as error:
            raise ValueError(f"the checkpoint's chat template is no valid Jinja: {error}") from error


def special_tokens(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The ``*_token`` entries as text; each is a string, or a dictionary with "content"."""
    found = {}
    for name, value in tokenizer_config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if name.endswith("_token") and isinstance(text, str):
            found[name] = text
    return found


class _Generation(Extension):
    """Accepts ``{% generation %}…{% endgeneration %}``, which marks the assistant's words for training."""

    tags = {"generation"}  # noqa: RUF012 (how jinja2 declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainNamespace(Namespace):
    """``namespace()`` without underscore names, through which templates have left the sandbox before."""

    def __init__(*args: Any, **kwargs: Any):  # so that namespace(self=...) works, as in Jinja
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a chat template may not store the attribute {name!r}")


def _environment() -> ImmutableSandboxedEnvironment:
    # The options, the filter and the functions are those that transformers gives: templates are written for it.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise, strftime_now=lambda format: datetime.now().strftime(format), namespace=_PlainNamespace
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _plain(value: Any) -> Any:
    """A copy made of JSON types; anything else becomes its type's name."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    return f"<{type(value).__name__}>"
