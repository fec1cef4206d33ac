"""`AsyncEngine`: one thread steps, the event loop submits, reads and cancels."""

import asyncio
import threading

import pytest

from jaxmoe.generation.async_engine import AsyncEngine, EngineStoppedError
from jaxmoe.generation.requests import Request
from tests.support.fake_engine import FakeEngine, tokens_of


def request(*prompt: int, count: int = 5) -> Request:
    return Request(token_ids=prompt, max_new_tokens=count)


async def read(engine: AsyncEngine, one: Request) -> list[int]:
    async with await engine.submit([one]) as tokens:
        return [result.token_id async for _, result in tokens]


def test_many_at_once_get_their_own_tokens_from_one_thread() -> None:
    fake = FakeEngine()

    async def run():
        async with AsyncEngine(fake) as engine:
            found = await asyncio.gather(*(read(engine, request(n, n + 1, count=n)) for n in range(1, 20)))
            assert engine.unfinished == 0
        return found

    assert asyncio.run(run()) == [tokens_of([n, n + 1], n, 37) for n in range(1, 20)]
    assert fake.threads == {"jaxmoe-engine"}
    assert not [thread for thread in threading.enumerate() if thread.name == "jaxmoe-engine"]


def test_a_request_that_cannot_run_is_refused_and_harms_no_other() -> None:
    async def run():
        async with AsyncEngine(FakeEngine()) as engine:
            with pytest.raises(ValueError, match="token 0 is not for prompts"):
                await engine.submit([request(0)])
            assert engine.unfinished == 0
            return await read(engine, request(3))

    assert asyncio.run(run()) == tokens_of([3], 5, 37)


def test_leaving_the_block_cancels() -> None:
    fake = FakeEngine()

    async def run():
        async with AsyncEngine(fake) as engine:
            async with await engine.submit([request(3, count=10**6)]) as tokens:
                async for _ in tokens:
                    break
            await engine.call(lambda: None)
            assert fake.canceled == [0]
            assert not fake.has_work
            assert engine.unfinished == 0
            tokens.cancel()
            assert [result async for result in tokens] == []

    asyncio.run(run())


def test_canceling_ends_who_waits_for_the_next_token() -> None:
    gate = threading.Event()

    async def run():
        async with AsyncEngine(FakeEngine(gate=gate)) as engine:
            tokens = await engine.submit([request(3)])
            reader = asyncio.create_task(anext(tokens, None))
            await asyncio.sleep(0)
            tokens.cancel()
            gate.set()
            assert await asyncio.wait_for(reader, timeout=30) is None

    asyncio.run(run())


def test_a_caller_that_gives_up_while_it_submits_leaves_nothing() -> None:
    gate = threading.Event()
    fake = FakeEngine(gate=gate)

    async def run():
        async with AsyncEngine(fake) as engine:
            await engine.submit([request(3)])  # the thread is in a step now, or soon
            late = asyncio.create_task(engine.submit([request(4, count=10**6)]))
            await asyncio.sleep(0.05)
            late.cancel()
            await asyncio.gather(late, return_exceptions=True)
            assert engine.unfinished == 1
            gate.set()
            while engine.unfinished or engine.counts.running:
                await asyncio.sleep(0.001)
            await engine.call(lambda: None)
            assert not fake.has_work

    asyncio.run(run())


def test_an_error_in_a_step_reaches_everyone() -> None:
    fake = FakeEngine()

    async def run():
        async with AsyncEngine(fake) as engine:
            streams = [await engine.submit([request(n, count=10**6)]) for n in (1, 2)]
            await engine.call(lambda: setattr(fake, "breaks", RuntimeError("out of memory")))
            for tokens in streams:
                with pytest.raises(EngineStoppedError, match="the engine has ended: out of memory"):
                    async for _ in tokens:
                        pass
                assert [result async for result in tokens] == []
            with pytest.raises(EngineStoppedError, match="out of memory"):
                await engine.submit([request(3)])
            assert engine.error is fake.breaks
            assert engine.unfinished == 0

    asyncio.run(run())


def test_closing_ends_unfinished_requests() -> None:
    fake = FakeEngine()

    async def run():
        async with AsyncEngine(fake) as engine:
            tokens = await engine.submit([request(3, count=10**6)])
        assert not fake.has_work
        with pytest.raises(EngineStoppedError, match="the engine has ended$"):
            async for _ in tokens:
                pass
        with pytest.raises(EngineStoppedError):
            await engine.call(lambda: None)

    asyncio.run(run())


def test_requests_that_belong_together_end_one_by_one() -> None:
    fake = FakeEngine()

    async def run():
        found: dict[int, list[int]] = {0: [], 1: [], 2: []}
        async with AsyncEngine(fake) as engine:
            requests = [request(3, count=4), request(4, count=10**6), request(5, count=2)]
            async with await engine.submit(requests) as tokens:
                async for index, result in tokens:
                    found[index].append(result.token_id)
                    if index == 1 and len(found[1]) == 3:
                        tokens.cancel(1)
            await engine.call(lambda: None)
            assert fake.canceled == [1]
            with pytest.raises(ValueError, match="token 0"):
                await engine.submit([request(3, count=10**6), request(0)])
            await engine.call(lambda: None)
            assert not fake.has_work
            assert engine.unfinished == 0
        return found

    expected = {0: tokens_of([3], 4, 37), 1: tokens_of([4], 3, 37), 2: tokens_of([5], 2, 37)}
    assert asyncio.run(run()) == expected
