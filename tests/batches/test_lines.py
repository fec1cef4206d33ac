"""Lines of an input file: what is taken, and what is said of the rest."""

import pytest

from jaxmoe.batches.lines import LineError, read_line
from jaxmoe.batches.settings import LineSettings
from jaxmoe.generation import SamplingParams

DEFAULTS = LineSettings(params=SamplingParams(temperature=0.5, top_k=3), max_new_tokens=9, stop=("x",), adapter="sql")
SCHEMA = {"type": "boolean"}
FORM = '{"type": "json_schema", "json_schema": {"name": "b", "schema": {"type": "boolean"}}}'


def test_a_line_comes_before_the_defaults() -> None:
    text = (
        b'{"prompt": [5, 6], "temperature": 0, "max_tokens": 7, "min_tokens": 2, "seed": 3, "stop": "end", "n": 2, '
        b'"logprobs": 4, "logit_bias": {"5": -1.5}, "top_k": null, "adapter": "none", "id": 1, "metadata": {"any": [1]}}'
    )
    line = read_line(text, DEFAULTS)
    assert line.prompt == [5, 6]
    assert line.carried == {"id": 1, "metadata": {"any": [1]}}
    assert line.settings == LineSettings(
        params=SamplingParams(temperature=0, top_k=3),
        max_new_tokens=7,
        min_new_tokens=2,
        seed=3,
        stop=("end",),
        n=2,
        logprobs=4,
        logit_bias={5: -1.5},
        adapter=None,
    )
    assert read_line(b'{"prompt": "a"}', DEFAULTS).settings == DEFAULTS


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('"max_tokens": 5, "max_new_tokens": 5', "max_new_tokens", 5),
        ('"logprobs": true, "top_logprobs": 2', "logprobs", 2),
        ('"logprobs": true', "logprobs", 0),
        ('"logprobs": false', "logprobs", None),
        (f'"response_format": {FORM}', "schema", SCHEMA),
        ('"response_format": {"type": "json_object"}', "schema", {"type": "object"}),
        ('"response_format": {"type": "text"}', "schema", None),
        ('"n": 2, "n": 2', "n", 2),
    ],
)
def test_names_of_a_setting(text, name, value) -> None:
    line = read_line(f'{{"prompt": "a", {text}}}'.encode(), LineSettings(logprobs=1 if value is None else None))
    assert getattr(line.settings, name) == value


def test_chats() -> None:
    chat = LineSettings(chat=True, system="Be brief.")
    user = {"role": "user", "content": "Hi"}
    assert read_line(b'{"prompt": "Hi"}', chat).prompt == [{"role": "system", "content": "Be brief."}, user]
    for field in ("prompt", "messages"):
        assert read_line(f'{{"{field}": [{{"role": "user", "content": "Hi"}}]}}'.encode(), chat).prompt == [user]
    assert read_line(b'{"prompt": [1, 2]}', chat).prompt == [1, 2]
    line = read_line(b'{"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "function"}]}', DEFAULTS)
    assert line.tools == [{"type": "function"}]


def test_openai_s_format() -> None:
    text = (
        b'{"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "max_tokens": 3, '
        b'"messages": [{"role": "user", "content": "Hi"}], "user": "me"}}'
    )
    line = read_line(text, DEFAULTS)
    assert (line.carried, line.model, line.settings.max_new_tokens) == ({"custom_id": "r1"}, "m", 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{bad", "a line is a JSON object; this is no JSON: "),
        ("[1]", "a line is a JSON object; got list"),
        (b'{"prompt": "\xff"}', "a line is UTF-8 text; "),
        ('{"prompt": "\\ud800"}', "texts are of whole characters; one has half a surrogate pair"),
        ("[" * 100_000, "nested too deeply"),
        ('{"temperature": 1}', "a line has one of prompt and messages; got neither"),
        ('{"prompt": "a", "messages": []}', "a line has one of prompt and messages; got prompt and messages"),
        (
            '{"prompt": "a", "temprature": 1}',
            "there is no field 'temprature': a line has prompt or messages, settings (",
        ),
        ('{"prompt": "a", "temperature": -1}', "temperature is at least 0 (0 is greedy); got -1.0"),
        ('{"prompt": "a", "temperature": NaN}', "numbers of JSON are finite; got NaN"),
        ('{"prompt": "a", "max_tokens": 0}', "max_new_tokens is an integer of at least 1; got 0"),
        ('{"prompt": "a", "max_tokens": 4, "min_tokens": 5}', "min_new_tokens is an integer from 0 to 4; got 5"),
        ('{"prompt": "a", "n": 999}', "n is an integer from 1 to 128; got 999"),
        ('{"prompt": "a", "seed": -1}', "seed is an integer of at least 0; got -1"),
        ('{"prompt": "a", "seed": 36893488147419103232}', "seed is an integer from 0 to 18446744073709551615"),
        ('{"prompt": "a", "logprobs": 21}', "logprobs is an integer from 0 to 20; got 21"),
        ('{"prompt": "a", "stop": ["x", ""]}', "stop is a text or a list of them, none of them empty"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias is an object of token ids and numbers"),
        ('{"prompt": "a", "response_format": {"type": "xml"}}', "response_format is {"),
        (f'{{"prompt": "a", "response_format": {FORM}, "ignore_eos": true}}', "goes with neither ignore_eos"),
        (f'{{"prompt": "a", "response_format": {FORM}, "min_tokens": 2}}', "goes with neither ignore_eos"),
        (
            '{"prompt": "a", "max_tokens": 4, "max_new_tokens": 5}',
            "max_new_tokens and max_tokens are two names of one setting; got",
        ),
        ('{"prompt": "a", "n": 1, "n": 2}', "a field is given once; 'n' is 1 and 2"),
        ('{"prompt": "a", "top_logprobs": 2}', "top_logprobs goes with logprobs=true"),
        ('{"prompt": "a", "tools": []}', "tools is for the chat template: it goes with messages"),
        ('{"messages": "Hi"}', "messages is a list of objects with role and content"),
        ('{"custom_id": "a", "body": {"prompt": "a"}, "prompt": "a"}', "move it into the body"),
        ('{"body": {"prompt": "a"}, "url": "/v1/embeddings"}', '"url" is one of /v1/chat/completions, /v1/completions'),
        ('{"body": {"prompt": "a"}, "url": "/v1/chat/completions"}', 'has "messages"; this one has not'),
        ('{"body": {"prompt": "a", "stream": true}}', "a file is not streamed"),
    ],
)
def test_what_is_refused(text, message) -> None:
    with pytest.raises(LineError) as caught:
        read_line(text if isinstance(text, bytes) else text.encode(), LineSettings())
    assert message in str(caught.value)


def test_an_error_keeps_what_was_carried() -> None:
    with pytest.raises(LineError) as caught:
        read_line(b'{"id": "a", "metadata": 5, "prompt": ""' + b', "what": 1}', LineSettings())
    assert caught.value.carried == {"id": "a", "metadata": 5}
