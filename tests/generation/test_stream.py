"""`jaxmoe.stream` over a fake engine: order, text, ends, and leaving early."""

import asyncio

import pytest

import jaxmoe
from jaxmoe.generation import streaming
from tests.support.fake_engine import FakeEngine, tokens_of
from tests.support.fake_model import FakeModel
from tests.support.meshes import mesh_of
from tests.support.tokenizers import byte_level, save


@pytest.fixture
def engine(monkeypatch) -> FakeEngine:
    fake = FakeEngine(vocab_size=37, num_slots=2)
    monkeypatch.setattr(streaming, "ContinuousEngine", lambda model, **sizes: vars(fake).update(sizes) or fake)
    return fake


@pytest.fixture
def model(tmp_path) -> FakeModel:
    save(byte_level(), tmp_path)
    return FakeModel(mesh_of(1, 1, 8), source=tmp_path)


PROMPTS = [[5, 6], [7], [8, 9, 10]]


def test_every_token_is_an_event(engine, model) -> None:
    events = [*jaxmoe.stream(model, PROMPTS, max_new_tokens=4, num_slots=3, max_length=32, ignore_eos=True)]
    for index, prompt in enumerate(PROMPTS):
        own = [event for event in events if event.index == index]
        expected = tokens_of(prompt, 4, 37)
        assert [event.token_id for event in own] == expected
        assert [event.finish_reason for event in own] == [None, None, None, "length"]
        assert "".join(event.text for event in own) == byte_level().decode(expected)
    assert (engine.num_slots, engine.max_length) == (3, 32)
    # They do not wait for each other.
    assert [event.index for event in events] != sorted(event.index for event in events)


def test_async_for_gives_the_same(engine, model) -> None:
    async def run():
        return [event async for event in jaxmoe.stream(model, PROMPTS, max_new_tokens=4)]

    assert asyncio.run(run()) == [*jaxmoe.stream(model, PROMPTS, max_new_tokens=4)]


def test_settings_and_stops_reach_their_place(engine, model) -> None:
    first, second = tokens_of([5, 6], 2, 37)
    text = byte_level().decode([second])
    settings = jaxmoe.SamplingParams(temperature=0.5)
    events = [
        *jaxmoe.stream(
            model, PROMPTS[:2], max_new_tokens=9, sampling_params=settings, seed=[3, 4], stop=text, eos_token_id=36
        )
    ]
    own = [event for event in events if event.index == 0]
    assert [event.token_id for event in own] == [first, second]
    assert (own[1].text, own[1].finish_reason) == ("", "stop")
    assert engine.canceled[0] == 0
    assert [request.seed for request in engine.submitted] == [3, 4]
    assert engine.submitted[0].params == settings
    assert engine.submitted[0].eos_token_ids == {36}


def test_one_prompt_is_canceled_and_the_others_go_on(engine, model) -> None:
    seen = []
    with jaxmoe.stream(model, PROMPTS, max_new_tokens=6) as events:
        for event in events:
            seen.append(event)
            if len(seen) == 3:
                events.cancel(0)
    assert engine.canceled == [0]
    assert [event.index for event in seen].count(0) == 1
    assert [event.index for event in seen].count(1) == [event.index for event in seen].count(2) == 6
    with jaxmoe.stream(model, PROMPTS, max_new_tokens=6) as events:
        assert next(events).index == 0
        events.cancel(1)  # its first event is there already
        assert {event.index for event in events} == {0, 2}
    with pytest.raises(ValueError, match="index is an integer from 0 to 2; got 3"):
        events.cancel(3)


def test_leaving_the_block_cancels_all(engine, model) -> None:
    with jaxmoe.stream(model, PROMPTS, max_new_tokens=6) as events:
        next(events)
    assert engine.canceled == [0, 1, 2]
    assert [*events] == []
    engine.canceled.clear()

    async def run():
        async with jaxmoe.stream(model, PROMPTS, max_new_tokens=6) as events:
            await anext(events)
        assert [event async for event in events] == []

    asyncio.run(run())
    assert engine.canceled == [3, 4, 5]


def test_a_wait_that_is_given_up_loses_no_token(engine, model) -> None:
    engine.pace = 0.02

    async def run():
        events, found = jaxmoe.stream(model, PROMPTS, max_new_tokens=4), []
        while True:
            try:
                found.append(await asyncio.wait_for(anext(events), 0.005))
            except TimeoutError:
                continue
            except StopAsyncIteration:
                return found

    assert asyncio.run(run()) == [*jaxmoe.stream(model, PROMPTS, max_new_tokens=4)]


def test_timeout(engine, model) -> None:
    engine.pace = 0.02
    events = jaxmoe.stream(model, PROMPTS, max_new_tokens=500, timeout=0.1)
    with pytest.raises(
        TimeoutError, match="the timeout of jaxmoe.stream is over; the prompts that were left are cancel"
    ):
        for _ in events:
            pass
    assert not engine.has_work
    assert [*events] == []
    with pytest.raises(ValueError, match="timeout is a finite number above 0; got 0"):
        jaxmoe.stream(model, PROMPTS, timeout=0)


def test_wrong_prompts_are_refused(engine, model) -> None:
    with pytest.raises(ValueError, match="token ids are 0 to 36"):
        jaxmoe.stream(model, [[5, 40]])
    with pytest.raises(ValueError, match="adapters has a name or None for each prompt: got 1 for 3 prompts"):
        jaxmoe.stream(model, PROMPTS, adapters=["sql"])
    with pytest.raises(ValueError, match="token 0 is not for prompts"):
        jaxmoe.stream(model, [[5], [0]])
