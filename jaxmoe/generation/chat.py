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
        source: text of the template.
        variables: variables that it may use besides the messages: ``bos_token``, ``eos_token`` and so on.

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

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Make the prompt text of a conversation.

        Args:
            messages: dictionaries with "role" and "content", oldest first.
            add_generation_prompt: whether to end with what opens the assistant's turn.
            variables: further variables for the template, such as ``enable_thinking=False`` or ``tools=[...]``.

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


class ChatTemplates:
    """A checkpoint's templates by name: one called "default", and perhaps others for certain uses.

    Args:
        templates: templates by name, at least one.

    Example:
        >>> templates = ChatTemplates({"default": ChatTemplate("chat"), "tool_use": ChatTemplate("tools")})
        >>> templates.choose(tools=[{"name": "search"}]).source
        'tools'
    """

    def __init__(self, templates: Mapping[str, ChatTemplate]):
        self._templates = dict(templates)

    @classmethod
    def from_directory(cls, directory: Path, tokenizer_config: Mapping[str, Any]) -> "ChatTemplates | None":
        """Read the templates of a checkpoint as transformers finds them.

        Files come first: ``chat_template.jinja``, which is the default, and ``additional_chat_templates/NAME.jinja``. Where
        there is none of them, what ``tokenizer_config.json`` holds: one template, or a list of {name, template}.

        Returns:
            The templates; None where there is neither.

        Raises:
            ValueError: a template is no valid Jinja, or the list's entries are something else.
        """
        files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
        if (default := directory / "chat_template.jinja").is_file():
            files["default"] = default
        if files:
            sources = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        else:
            sources = _named_sources(tokenizer_config.get("chat_template"))
        variables = special_tokens(tokenizer_config)
        return cls({name: ChatTemplate(source, variables) for name, source in sources.items()}) if sources else None

    def choose(self, name: str | None = None, tools: Any = None) -> ChatTemplate:
        """Choose a template by name; without one "tool_use" where tools are given and there is such, else "default".

        Raises:
            ValueError: there is none of that name, or no default.
        """
        wanted = name or ("tool_use" if tools is not None and "tool_use" in self._templates else "default")
        if wanted not in self._templates:
            raise ValueError(
                f"this checkpoint's chat templates are {', '.join(sorted(self._templates))}; got no template "
                f'{wanted!r}: name one of them with chat_template_kwargs={{"chat_template": NAME}}'
            )
        return self._templates[wanted]


def _named_sources(chat_template: Any) -> dict[str, str]:
    """The entry of ``tokenizer_config.json`` as texts by name."""
    if chat_template is None:
        return {}
    entries = chat_template if isinstance(chat_template, list) else [{"name": "default", "template": chat_template}]
    for entry in entries:
        fields = [entry.get(key) for key in ("name", "template")] if isinstance(entry, Mapping) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(
                'chat_template in tokenizer_config.json is a text or a list of {"name": text, "template": text}; '
                f"got {str(entry)[:60]!r}"
            )
    return {entry["name"]: entry["template"] for entry in entries}


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
