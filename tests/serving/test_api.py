"""The API over a fake engine: answers, their parts, refusals, keys and limits."""

import asyncio
import json
import sys

import pytest

from jaxmoe.generation.detokenize import TextStream
from tests.support.fake_engine import FakeEngine, tokens_of

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "he"}]


def completion(**fields):
    return {"model": "base", "prompt": [5, 6], "max_tokens": 4, **fields}


def chat(**fields):
    return {"model": "base", "messages": MESSAGES, "max_tokens": 4, **fields}


def text_of(tokenizer, tokens, stop=()):
    stream = TextStream(tokenizer.decode, stop, tokenizer.special_tokens)
    return "".join(stream.push(token) for token in tokens) + stream.finish()


def events(response):
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_a_completion_has_text_reasons_and_counts(ask, tokenizer) -> None:
    answer = ask(COMPLETIONS, completion(prompt=[[5, 6], [7]], n=2)).json()
    texts = [text_of(tokenizer, tokens_of(prompt, 4, 100)) for prompt in ([5, 6], [5, 6], [7], [7])]
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
    assert (answer["object"], answer["model"]) == ("text_completion", "base")


def test_a_chat_goes_through_the_template_with_its_tools(ask, tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "e"}]}]
    answer = ask(CHAT, chat(messages=parts, tools=tools)).json()
    prompt = tokenizer.encode("[look]user:he;", add_special_tokens=False)
    assert list(ask.engine.submitted[0].token_ids) == prompt
    text = text_of(tokenizer, tokens_of(prompt, 4, 100))
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
    ask(CHAT, chat(tools=tools, tool_choice="none"))
    assert list(ask.engine.submitted[0].token_ids) == tokenizer.encode("user:he;", add_special_tokens=False)


TOOLS = [{"type": "function", "function": {"name": "look"}}]
TWO_CALLS = [f'<tool_call>\n{{"name": "look", "arguments": {{"at": {at}}}}}\n</tool_call>' for at in (5, 6)]


class Scripted(FakeEngine):
    """Generates a text, and its end."""

    def __init__(self, tokenizer, text: str):
        super().__init__(vocab_size=1000)
        self.script = [*tokenizer.encode(text, add_special_tokens=False), 99]

    def submit(self, request):
        number = super().submit(request)
        self.jobs[number] = request, self.script[: request.max_new_tokens]
        return number


def test_calls_of_tools_are_told_as_such(ask, tokenizer) -> None:
    body = chat(tools=TOOLS, n=2, max_tokens=150, logprobs=True)
    text = "\n".join(["I look.", *TWO_CALLS])
    answer = ask(CHAT, body, engine=Scripted(tokenizer, text)).json()
    for choice in answer["choices"]:
        message = choice["message"]
        assert (message["content"], choice["finish_reason"]) == ("I look.", "tool_calls")
        functions = [call["function"] for call in message["tool_calls"]]
        assert functions == [{"name": "look", "arguments": f'{{"at": {at}}}'} for at in (5, 6)]
    ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 4

    *chunks, _ = events(
        ask(CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}}, engine=Scripted(tokenizer, text))
    )
    for index, expected in enumerate(answer["choices"]):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "I look."
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
        assert [call["index"] for call in calls] == [0, 1]
        assert [call["function"] for call in calls] == [one["function"] for one in expected["message"]["tool_calls"]]
        assert choices[-1]["finish_reason"] == "tool_calls"
        told = [one for choice in choices[1:] for one in choice["logprobs"]["content"]]
        assert told == expected["logprobs"]["content"], "tokens of calls have theirs too"

    without = ask(CHAT, chat(max_tokens=150), engine=Scripted(tokenizer, text)).json()["choices"][0]
    assert (without["message"]["content"], without["finish_reason"]) == (text, "stop")
    alone = ask(CHAT, chat(tools=TOOLS, max_tokens=150), engine=Scripted(tokenizer, TWO_CALLS[0])).json()["choices"][0]
    assert alone["message"]["content"] is None
    cut = ask(CHAT, chat(tools=TOOLS, max_tokens=60), engine=Scripted(tokenizer, text)).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == (text[:60], "length")
    assert "tool_calls" not in cut["message"]


def test_calls_of_before_reach_the_template_as_objects(ask, tokenizer) -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "look", "arguments": '{"at": "here"}'}}]
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": calls}]
    text = "user:he;assistant:None(here);"
    ask(CHAT, chat(messages=messages))
    assert list(ask.engine.submitted[0].token_ids) == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_has_the_same_text_and_ends_with_counts(ask, path: str) -> None:
    body = completion(n=2, logprobs=1) if path == COMPLETIONS else chat(n=2, logprobs=True)
    whole = ask(path, body).json()
    response = ask(path, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, last = events(response)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        expected = whole["choices"][index]
        if path == COMPLETIONS:
            assert "".join(choice["text"] for choice in choices) == expected["text"]
            offsets = [offset for choice in choices for offset in choice["logprobs"]["text_offset"]]
            assert offsets == expected["logprobs"]["text_offset"]
        else:
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(choice["delta"].get("content", "") for choice in choices) == expected["message"]["content"]
            told = [one for choice in choices[1:] for one in choice["logprobs"]["content"]]
            assert told == expected["logprobs"]["content"]
        assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]


def test_logprobs_have_the_form_of_each_api(ask, tokenizer) -> None:
    tokens = tokens_of([5, 6], 4, 100)
    told = ask(COMPLETIONS, completion(logprobs=2)).json()["choices"][0]["logprobs"]
    assert told["tokens"] == [tokenizer.decode([token]) for token in tokens]
    assert told["token_logprobs"] == [-0.5] * 4
    assert told["top_logprobs"][0] == {tokenizer.decode([tokens[0]]): -0.5, tokenizer.decode([tokens[0] + 1]): -1.5}
    assert told["text_offset"] == [0, 1, 2, 3]
    prompt = tokenizer.encode("user:he;", add_special_tokens=False)
    first = tokens_of(prompt, 1, 100)[0]
    content = ask(CHAT, chat(logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]["content"]
    text = tokenizer.decode([first])
    assert content[0]["token"] == text
    assert content[0]["bytes"] == list(text.encode())
    assert [one["logprob"] for one in content[0]["top_logprobs"]] == [-0.5]
    assert ask(COMPLETIONS, completion()).json()["choices"][0]["logprobs"] is None


def test_a_stop_string_ends_the_text_and_the_request(ask, tokenizer) -> None:
    text = text_of(tokenizer, tokens_of([5, 6], 8, 100))
    body = completion(max_tokens=100, stop=[text[3:5], "never"])
    answer = ask(COMPLETIONS, body, engine=FakeEngine(vocab_size=100, pace=0.01)).json()
    assert answer["choices"][0]["text"] == text[:3]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 5
    assert ask.engine.canceled == [0]


def test_settings_reach_the_engine(ask) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2}
    ask(
        COMPLETIONS, completion(n=2, seed=-1, logit_bias={"8": -100}, ignore_eos=True, model="sql", user="me", **fields)
    )
    first, second = ask.engine.submitted
    assert (first.seed, second.seed) == (2**64 - 1, 0)
    assert (first.params.temperature, first.params.top_p, first.params.top_k) == (0.5, 0.9, 7)
    assert (first.params.min_p, first.params.repetition_penalty, first.min_new_tokens) == (0.1, 1.5, 2)
    assert dict(first.logit_bias) == {8: -100}
    assert (first.adapter, first.eos_token_ids) == ("sql", frozenset())
    ask(CHAT, {"model": "base", "messages": MESSAGES})
    (defaults,) = ask.engine.submitted
    assert (defaults.params.temperature, defaults.adapter, defaults.eos_token_ids) == (1.0, None, {99})
    assert defaults.max_new_tokens == 200 - len(defaults.token_ids)
    assert ask(COMPLETIONS, {"model": "base", "prompt": "he"}).json()["usage"]["completion_tokens"] == 16


def test_json_of_a_schema_ends_where_it_is_complete(ask, monkeypatch) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": {"enum": [[12, 3]]}}}
    body = chat(response_format=form, max_tokens=50, n=2)
    answer = ask(CHAT, body).json()
    assert [json.loads(choice["message"]["content"]) for choice in answer["choices"]] == [[12, 3]] * 2
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    assert ask(CHAT, chat(response_format={"type": "text"})).json()["choices"][0]["finish_reason"] == "length"
    monkeypatch.setitem(sys.modules, "llguidance", None)
    response = ask(CHAT, body)
    assert response.status_code == 400
    assert 'pip install "jaxmoe[constrain]"' in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "message"),
    [
        (COMPLETIONS, {"model": None}, 400, "model", "model is missing"),
        (COMPLETIONS, {"model": "gpt"}, 404, "model", "there is no model 'gpt'; /v1/models lists base, sql"),
        (COMPLETIONS, {"prompt": None}, 400, "prompt", "prompt is a text, a list of texts, token ids, or a list"),
        (COMPLETIONS, {"prompt": [1, "a"]}, 400, "prompt", "prompt is a text"),
        (COMPLETIONS, {"prompt": ""}, 400, "prompt", "a prompt has at least one token"),
        (COMPLETIONS, {"prompt": [0]}, 400, None, "token 0 is not for prompts"),
        (COMPLETIONS, {"prompt": [0], "stream": True}, 400, None, "token 0 is not for prompts"),
        (COMPLETIONS, {"prompt": [-1]}, 400, None, "token_ids is an integer of at least 0; got -1"),
        (COMPLETIONS, {"max_tokens": 0}, 400, "max_tokens", "max_tokens is an integer of at least 1; got 0"),
        (COMPLETIONS, {"max_tokens": 199}, 400, "max_tokens", "at most 200 tokens together; the prompt has 2, and 199"),
        (COMPLETIONS, {"prompt": [1] * 300}, 400, None, "shorten the prompt"),
        (COMPLETIONS, {"min_tokens": 9}, 400, "min_tokens", "min_tokens is at most the 4 of max_tokens; got 9"),
        (COMPLETIONS, {"temperature": 3}, 400, "temperature", "temperature is a finite number from 0 to 2; got 3"),
        (COMPLETIONS, {"temperature": "hot"}, 400, "temperature", "got 'hot'"),
        (COMPLETIONS, {"n": 129}, 400, "n", "n is an integer from 1 to 128; got 129"),
        (COMPLETIONS, {"n": True}, 400, "n", "got True"),
        (COMPLETIONS, {"stop": [""]}, 400, "stop", "none of them empty"),
        (COMPLETIONS, {"logprobs": 21}, 400, "logprobs", "logprobs is an integer from 0 to 20; got 21"),
        (COMPLETIONS, {"logit_bias": {"a": 1}}, 400, "logit_bias", "an object of token ids and numbers"),
        (COMPLETIONS, {"echo": True}, 400, "echo", "echo is False here, or left out; got True"),
        (COMPLETIONS, {"frequency_penalty": 1}, 400, "frequency_penalty", "frequency_penalty is 0 here"),
        (COMPLETIONS, {"stream_options": {}}, 400, "stream_options", "stream_options goes with stream=true"),
        (COMPLETIONS, {"messages": MESSAGES}, 400, "messages", "there is no field 'messages'"),
        (CHAT, {"prompt": "he"}, 400, "prompt", "there is no field 'prompt'; leave it out"),
        (CHAT, {"messages": []}, 400, "messages", "messages is a list of at least one message"),
        (CHAT, {"messages": [{"content": "a"}]}, 400, "messages[0]", 'an object with a "role"'),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0]", "parts"),
        (CHAT, {"max_completion_tokens": 5}, 400, "max_completion_tokens", "two names of one limit; got 4 and 5"),
        (CHAT, {"top_logprobs": 2}, 400, "top_logprobs", "top_logprobs goes with logprobs=true"),
        (CHAT, {"tool_choice": "required"}, 400, "tool_choice", "tool_choice is 'auto' or 'none' here"),
        (CHAT, {"tools": TOOLS, "parallel_tool_calls": False}, 400, "parallel_tool_calls", "is True here"),
        (CHAT, {"tools": [{"type": "function", "function": {}}]}, 400, "tools", '"function": {"name": ...}}'),
        (
            CHAT,
            {"tools": TOOLS, "chat_template_kwargs": {"chat_template": "no calls"}},
            400,
            "tools",
            "as function tags, argument tags, JSON, and this model's chat template asks for none of these",
        ),
        (CHAT, {"tools": TOOLS, "chat_template_kwargs": {"chat_template": "x"}}, 400, "messages", "no template 'x'"),
        (
            CHAT,
            {"tools": TOOLS, "response_format": {"type": "json_object"}},
            400,
            "response_format",
            "lets no token come that would call a tool",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "5"}}]}]},
            400,
            "messages[0].tool_calls",
            "arguments that are a JSON object; got '5'",
        ),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [5]}]}, 400, "messages[0].tool_calls", "is a list of"),
        (
            CHAT,
            {"response_format": {"type": "xml"}},
            400,
            "response_format",
            'response_format is {"type": "json_schema"',
        ),
        (
            CHAT,
            {"response_format": {"type": "json_object"}, "ignore_eos": True},
            400,
            "response_format",
            "leave ignore_eos out",
        ),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "it"}}}},
            400,
            "response_format",
            "schema",
        ),
        (CHAT, {"chat_template_kwargs": {"messages": 1}}, 400, "chat_template_kwargs", "variables of the template's"),
    ],
)
def test_refusals(ask, path: str, fields: dict, status: int, param: str | None, message: str) -> None:
    body = (completion if path == COMPLETIONS else chat)(**fields)
    response = ask(path, body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not ask.engine.has_work


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "message"),
    [
        (COMPLETIONS, b"{}", {"content-type": "text/plain"}, 415, "a request is JSON: Content-Type: application/json"),
        (COMPLETIONS, b"{", {"content-type": "application/json"}, 400, "the body is no JSON"),
        (COMPLETIONS, b"[" * 100_000, {"content-type": "application/json"}, 400, "the body is no JSON"),
        (COMPLETIONS, b"[]", {"content-type": "application/json; charset=utf-8"}, 400, "a JSON object; got list"),
        (COMPLETIONS, b" " * 1000_001, {"content-type": "application/json"}, 413, "at most 1000000 bytes"),
        (COMPLETIONS, None, {}, 405, "GET does not go with /v1/completions"),
        ("/v1/nothing", None, {}, 404, "there is no /v1/nothing"),
        ("/v1/models/other", None, {}, 404, "there is no model 'other'"),
    ],
)
def test_requests_that_are_none(ask, path, content, headers, status, message) -> None:
    response = ask(path, content, headers=headers, body_bytes=1000_000)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_a_body_without_a_length_is_bounded_in_bytes_and_time(served) -> None:
    async def chunks(pause):
        for _ in range(20):
            yield b" " * 100
            await asyncio.sleep(pause)

    async def run():
        headers = {"content-type": "application/json"}
        async with served(body_bytes=1000) as s:
            long = await s.client.post(COMPLETIONS, content=chunks(0), headers=headers)
        async with served(body_seconds=0.05) as s:
            slow = await s.client.post(COMPLETIONS, content=chunks(0.01), headers=headers)
        return long.status_code, slow.status_code

    assert asyncio.run(run()) == (413, 408)


def test_keys(ask) -> None:
    keys = ["a-key-of-some-length", "another-key-as-long"]
    wrong = ask("/v1/models", keys=keys, headers={"authorization": "Bearer a-key-of-some-lengtH"})
    assert wrong.status_code == 401
    assert wrong.headers["www-authenticate"] == "Bearer"
    assert wrong.json()["error"]["code"] == "invalid_api_key"
    for header in ("", "Basic a-key-of-some-length", "a-key-of-some-length"):
        assert ask("/v1/models", keys=keys, headers={"authorization": header}).status_code == 401
    assert ask("/metrics", keys=keys).status_code == 401
    assert ask("/health", keys=keys).status_code == 200
    for key in keys:
        response = ask(
            "/v1/models", keys=keys, headers={"authorization": f"Bearer {key}"}, base_url="http://far.example"
        )
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:80", 200),
        ("[::1]", 200),
        ("far.example:8000", 403),
        ("", 403),
    ],
)
def test_without_keys_only_this_machine_is_answered(ask, host: str, status: int) -> None:
    assert ask("/v1/models", headers={"host": host}).status_code == status


def test_models_are_the_model_and_its_adapters(ask) -> None:
    listed = ask("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["base", "sql"]
    assert ask("/v1/models/sql").json()["object"] == "model"


def test_a_full_queue_is_told_with_a_time_to_come_back(served) -> None:
    async def run():
        async with served(engine=FakeEngine(vocab_size=100, num_slots=2), queue=1) as s:
            held = await s.running.submit([s.service.requests([[5]], asked(max_tokens=150))[0]])
            too_many = await s.client.post(COMPLETIONS, json=completion(n=3))
            never = await s.client.post(COMPLETIONS, json=completion(n=4))
            held.cancel()
            fits = await s.client.post(COMPLETIONS, json=completion(n=3))
            return too_many, never, fits

    too_many, never, fits = asyncio.run(run())
    assert (too_many.status_code, never.status_code, fits.status_code) == (429, 400, 200)
    assert int(too_many.headers["retry-after"]) >= 1
    assert too_many.json()["error"]["type"] == "rate_limit_error"
    assert "1 requests run or wait already, and there is room for 3" in too_many.json()["error"]["message"]


def asked(**fields):
    from jaxmoe.serving.fields import read_fields

    return read_fields(completion(**fields), "completion")


def test_health_tells_of_the_end(served) -> None:
    async def run():
        async with served() as s:
            found = [await s.client.get("/health")]
            s.service.draining = True
            found += [await s.client.get("/health"), await s.client.post(COMPLETIONS, json=completion())]
            s.service.draining = False
            s.engine.breaks = RuntimeError("out of memory")
            found += [await s.client.post(COMPLETIONS, json=completion()), await s.client.get("/health")]
            found += [await s.client.post(COMPLETIONS, json=completion(stream=True))]
            return found

    found = asyncio.run(run())
    assert [response.status_code for response in found] == [200, 503, 503, 503, 503, 503]
    assert [found[place].json()["status"] for place in (0, 1, 4)] == ["ok", "draining", "failed"]
    assert "out of memory" in found[3].json()["error"]["message"]
    assert found[2].headers["retry-after"]


def test_metrics_count(served) -> None:
    async def run():
        async with served() as s:
            await s.client.post(COMPLETIONS, json=completion(n=2))
            await s.client.post(COMPLETIONS, json={})
            await s.client.get("/nowhere")
            await s.running.call(lambda: None)
            return (await s.client.get("/metrics")).text.splitlines()

    lines = asyncio.run(run())
    for line in (
        'jaxmoe_http_responses_total{path="/v1/completions",status="200"} 1.0',
        'jaxmoe_http_responses_total{path="/v1/completions",status="400"} 1.0',
        'jaxmoe_http_responses_total{path="other",status="404"} 1.0',
        'jaxmoe_choices_total{reason="length"} 2.0',
        "jaxmoe_generated_tokens_total 8.0",
        "jaxmoe_prompt_tokens_total 4.0",
        "jaxmoe_slots 4.0",
        "jaxmoe_running 0.0",
        "jaxmoe_time_to_first_token_seconds_count 2.0",
    ):
        assert line in lines
