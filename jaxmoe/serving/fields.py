"""The fields of a request's JSON body, checked: `Asked`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.checks import flag, integer, real_number
from jaxmoe.generation.json_fields import read_logit_bias, read_stop
from jaxmoe.generation.json_schema import Schema, schema_of
from jaxmoe.generation.params import SamplingParams
from jaxmoe.generation.requests import MOST_LOGPROBS
from jaxmoe.serving.errors import ApiError

MOST_CHOICES = 128
MOST_STOPS = 16

_BOTH = {
    *("model", "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p", "max_tokens", "logprobs"),
    *("logit_bias", "presence_penalty", "frequency_penalty"),
    # Others than OpenAI's, which other servers of open models have by these names.
    *("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos"),
}
_OF = {
    "completion": {*_BOTH, "prompt", "best_of", "echo", "suffix"},
    "chat": {
        *_BOTH,
        *("messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"),
        *("response_format", "chat_template_kwargs"),
    },
}
# Fields that say who asks and how to bill it, and change no token.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields that are taken with the value that changes nothing.
_ONLY: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Fields of a request, apart from its prompt.

    Attributes:
        model: name of the model or adapter.
        params: settings by which tokens are chosen; temperature 1 unless the request says otherwise, as in the API.
        max_tokens: most tokens of a choice; None where none is given.
        min_tokens: tokens before which no EOS token comes.
        n: choices for each prompt.
        stop: stop strings.
        seed: seed of the first choice; None for a fresh one.
        logit_bias: numbers added to logits, by token id.
        logprobs: likeliest tokens to tell beside each chosen one, 0 for that alone; None for none.
        ignore_eos: whether to go on to `max_tokens`.
        stream: whether tokens are told as they come.
        include_usage: whether a stream ends with its counts.
        schema: JSON schema of the text; None for any text.
    """

    model: str
    params: SamplingParams
    max_tokens: int | None
    min_tokens: int
    n: int
    stop: list[str]
    seed: int | None
    logit_bias: dict[int, float]
    logprobs: int | None
    ignore_eos: bool
    stream: bool
    include_usage: bool
    schema: Schema | None


def read_fields(body: Any, kind: str) -> Asked:
    """Check the fields of a body, but for its prompt or messages.

    Args:
        body: JSON of the request.
        kind: "completion" or "chat".

    Raises:
        ApiError: a field is unknown, missing, out of range, or asks for what is not there.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON object; got {type(body).__name__}")
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    for name in given:
        if name not in _OF[kind]:
            raise ApiError(400, f"there is no field {name!r}; leave it out", param=name, code="unknown_parameter")
    for name, allowed in _ONLY.items():
        if name in given and given[name] not in allowed:
            rule = " or ".join(repr(value) for value in allowed)
            raise ApiError(
                400,
                f"{name} is {rule} here, or left out; got {given[name]!r:.80}",
                param=name,
                code="unsupported_value",
            )
    read = _Reader(given)
    stream = read("stream", flag, False)
    return Asked(
        model=read("model", _text, None),
        params=_params(read),
        max_tokens=_max_tokens(read, kind),
        min_tokens=read("min_tokens", integer, 0, least=0),
        n=read("n", integer, 1, least=1, most=MOST_CHOICES),
        stop=read("stop", read_stop, [], most=MOST_STOPS),
        seed=read("seed", _seed, None),
        logit_bias=read("logit_bias", read_logit_bias, {}, least=-100, most=100),
        logprobs=_logprobs(read, kind),
        ignore_eos=read("ignore_eos", flag, False),
        stream=stream,
        include_usage=read("stream_options", _include_usage, False, stream=stream),
        schema=read("response_format", _schema, None, ignore_eos=given.get("ignore_eos") is True),
    )


class _Reader:
    """Reads one field after the other, and gives errors the field's name."""

    def __init__(self, given: Mapping[str, Any]):
        self.given = given

    def __call__(self, name: str, check: Any, default: Any, **rule: Any) -> Any:
        if name not in self.given:
            if name == "model":
                raise ApiError(400, "model is missing: the name of one of /v1/models", param="model")
            return default
        try:
            return check(name, self.given[name], **rule)
        except ValueError as error:
            raise ApiError(400, str(error), param=name) from error


def _params(read: _Reader) -> SamplingParams:
    settings = {
        "temperature": read("temperature", real_number, 1.0, least=0, most=2),
        "top_p": read("top_p", real_number, 1.0, above=0, most=1),
        "top_k": read("top_k", integer, None, least=0),
        "min_p": read("min_p", real_number, 0.0, least=0, most=1),
        "repetition_penalty": read("repetition_penalty", real_number, 1.0, above=0),
    }
    return SamplingParams(**settings)


def _max_tokens(read: _Reader, kind: str) -> int | None:
    old = read("max_tokens", integer, None, least=1)
    if kind == "completion":
        return 16 if old is None else old
    new = read("max_completion_tokens", integer, None, least=1)
    if old is not None and new is not None and old != new:
        raise ApiError(
            400,
            f"max_tokens and max_completion_tokens are two names of one limit; got {old} and {new}; give one",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _logprobs(read: _Reader, kind: str) -> int | None:
    if kind == "completion":
        return read("logprobs", integer, None, least=0, most=MOST_LOGPROBS)
    wanted, top = read("logprobs", flag, False), read("top_logprobs", integer, None, least=0, most=MOST_LOGPROBS)
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs goes with logprobs=true", param="top_logprobs")
    return (top or 0) if wanted else None


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is a text; got {value!r:.80}")
    return value


def _seed(name: str, value: Any) -> int:
    # JSON of other languages has signed integers.
    return integer(name, value, least=-(2**63), most=2**64 - 1) % 2**64


def _include_usage(name: str, value: Any, *, stream: bool) -> bool:
    if not stream:
        raise ValueError(f"{name} goes with stream=true")
    if not isinstance(value, dict) or not value.keys() <= {"include_usage", "include_obfuscation"}:
        raise ValueError(f'{name} is {{"include_usage": true}}; got {value!r:.80}')
    return flag("stream_options.include_usage", value.get("include_usage", False))


def _schema(name: str, value: Any, *, ignore_eos: bool) -> Schema | None:
    schema = schema_of(value)
    if schema is not None and ignore_eos:
        raise ValueError(f"{name} ends a text where its JSON ends, with an EOS token: leave ignore_eos out")
    return schema
