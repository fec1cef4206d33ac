"""`LineSettings`: what decides the text of a line, given by the command for all of them and by a line for itself."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from jaxmoe.checks import flag, integer, real_number
from jaxmoe.generation.json_fields import read_logit_bias, read_stop
from jaxmoe.generation.json_schema import Schema, schema_of
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.requests import MOST_LOGPROBS

MOST_SAMPLES = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineSettings:
    """Settings of one line, or of all that say nothing else.

    Attributes:
        params: settings by which tokens are chosen.
        max_new_tokens: number of tokens after which a text ends with reason "length".
        min_new_tokens: number of tokens before which no EOS token comes.
        seed: seed of the first sample, of which the others have the following; None for one that the run's seed and the
            number of the line give.
        stop: texts that end the output, and are cut off it.
        ignore_eos: whether to generate `max_new_tokens` whatever comes.
        logprobs: number of likeliest tokens to tell beside each chosen one, 0 for that alone; None for none.
        n: number of texts for the prompt.
        logit_bias: numbers added to logits, by token id.
        schema: JSON schema of the text; None for any text.
        adapter: name of an adapter that the model holds; None for the model as it is.
        chat: whether a text is a user's message, to be put through the chat template.
        system: system message before it.
        chat_template_kwargs: further variables for the chat template.

    Raises:
        ValueError: a setting is outside its range, or two do not go together.
    """

    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    schema: Schema | None = None
    adapter: str | None = None
    chat: bool = False
    system: str | None = None
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        integer("max_new_tokens", self.max_new_tokens, least=1)
        integer("min_new_tokens", self.min_new_tokens, least=0, most=self.max_new_tokens)
        integer("n", self.n, least=1, most=MOST_SAMPLES)
        if self.seed is not None:
            integer("seed", self.seed, least=0, most=2**64 - 1)
        if self.logprobs is not None:
            integer("logprobs", self.logprobs, least=0, most=MOST_LOGPROBS)
        if self.schema is not None and (self.ignore_eos or self.min_new_tokens):
            raise ValueError(
                "JSON of a schema ends where it is complete: response_format goes with neither ignore_eos nor "
                f"min_new_tokens; got ignore_eos={self.ignore_eos} and min_new_tokens={self.min_new_tokens}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for the record of a run."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **dataclasses.asdict(values.pop("params")),
            **values,
            "stop": list(self.stop),
            "logit_bias": {str(token): value for token, value in sorted(self.logit_bias.items())},
            "chat_template_kwargs": dict(self.chat_template_kwargs),
        }


def read_settings(given: Mapping[str, Any], defaults: LineSettings) -> LineSettings:
    """Settings of a line: those that it gives, and the defaults for the rest.

    Args:
        given: values by names of `NAMES`; null is as left out.
        defaults: settings of lines that say nothing else.

    Raises:
        ValueError: a value is out of range, or two names of one setting differ.
    """
    values: dict[str, Any] = {}
    said: dict[str, tuple[str, Any]] = {}
    for name in NAMES.keys() & {name for name, value in given.items() if value is not None}:
        setting, check = NAMES[name]
        value = check(name, given[name])
        other, before = said.get(setting, (name, value))
        if before != value:
            raise ValueError(
                f"{' and '.join(sorted((other, name)))} are two names of one setting; got {before!r:.40} and "
                f"{value!r:.40}; give one of them"
            )
        said[setting] = name, value
        values[setting] = value
    values.update(_logprobs(values.pop("logprobs", None), values.pop("top_logprobs", None)))
    if "format" in values:
        values["schema"] = schema_of(values.pop("format"))
    if values.get("adapter") == "none":
        values["adapter"] = None
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    params = {name: values.pop(name) for name in names & values.keys()}
    return dataclasses.replace(defaults, params=dataclasses.replace(defaults.params, **params), **values)


def _logprobs(wanted: Any, top: int | None) -> dict[str, Any]:
    """A number, or the API's pair of true and a number."""
    if wanted is None and top is None:
        return {}
    if top is None:
        return {"logprobs": (0 if wanted else None) if isinstance(wanted, bool) else wanted}
    if wanted is None or wanted is False or (wanted is not True and wanted != top):
        raise ValueError(f"top_logprobs goes with logprobs=true; got logprobs={wanted!r} and top_logprobs={top}")
    return {"logprobs": top}


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} is a text of at least one character; got {value!r:.80}")
    return value


def _stop(name: str, value: Any) -> tuple[str, ...]:
    return tuple(read_stop(name, value))


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is an object; got {value!r:.80}")
    return value


def _variables(name: str, value: Any) -> dict[str, Any]:
    taken = _object(name, value).keys() & {"messages", "add_generation_prompt", "tools"}
    if taken:
        raise ValueError(
            f"{name} are variables of the chat template's own; {min(taken)} is given by a field of the line"
        )
    return value


def _number(name: str, value: Any) -> float:
    return real_number(name, value)


def _count(name: str, value: Any) -> int:
    return integer(name, value, least=0)


def _count_or_flag(name: str, value: Any) -> int | bool:
    return value if isinstance(value, bool) else integer(name, value, least=0)


# Every name that a line may give a setting by, and its check.
NAMES: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    **{name: (name, _number) for name in ("temperature", "top_p", "min_p", "repetition_penalty")},
    "top_k": ("top_k", _count),
    "max_new_tokens": ("max_new_tokens", _count),
    "max_tokens": ("max_new_tokens", _count),
    "max_completion_tokens": ("max_new_tokens", _count),
    "min_new_tokens": ("min_new_tokens", _count),
    "min_tokens": ("min_new_tokens", _count),
    "seed": ("seed", _count),
    "stop": ("stop", _stop),
    "ignore_eos": ("ignore_eos", flag),
    "logprobs": ("logprobs", _count_or_flag),
    "top_logprobs": ("top_logprobs", _count),
    "n": ("n", _count),
    "logit_bias": ("logit_bias", read_logit_bias),
    "response_format": ("format", _object),
    "adapter": ("adapter", _text),
    "chat_template_kwargs": ("chat_template_kwargs", _variables),
}
