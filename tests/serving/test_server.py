"""The server on a socket of this machine: OpenAI's client, clients that go away, many at once, and the end."""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

import jaxmoe
from jaxmoe.generation import ContinuousEngine
from jaxmoe.generation.async_engine import AsyncEngine
from jaxmoe.generation.tokenizer import Tokenizer
from jaxmoe.serving import ExpertLoads, Limits, Metrics, Service, listen, run_service
from tests.support.fake_engine import FakeEngine, tokens_of
from tests.support.meshes import mesh_of

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "a-key-of-some-length"


@contextlib.contextmanager
def running(engine, tokenizer, *, keys=(), **limits):
    """A server in a thread of its own; `.url`, `.service`, `.tasks()` counts tasks of its event loop."""
    found = SimpleNamespace(engine=engine)
    started = threading.Event()

    async def run():
        async with AsyncEngine(engine) as asynchronous:
            found.service = Service(
                asynchronous,
                tokenizer,
                names={"base": None},
                eos_token_ids=frozenset(),
                limits=Limits(**{"max_length": 200, **limits}),
                metrics=Metrics(lambda: asynchronous.counts),
                vocab_size=100,
            )
            found.loop = asyncio.get_running_loop()

            def on_start(url):
                found.url = url
                started.set()

            with listen(port=0, keys=keys) as bound:
                server = asyncio.create_task(run_service(found.service, bound, keys=keys, on_start=on_start))
                found.stop = lambda: found.loop.call_soon_threadsafe(server.cancel)
                with contextlib.suppress(asyncio.CancelledError):
                    await server

    found.tasks = lambda: len(asyncio.all_tasks(found.loop))
    thread = threading.Thread(target=asyncio.run, args=[run()])
    thread.start()
    assert started.wait(60)
    try:
        yield found
    finally:
        found.stop()
        thread.join(60)
        assert not thread.is_alive()


def wait_until(holds, seconds=30):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_official_client_works(tokenizer) -> None:
    with running(FakeEngine(vocab_size=90), tokenizer, keys=[KEY]) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            expected = tokenizer.decode(tokens_of([5, 6], 6, 90))
            whole = client.completions.create(model="base", prompt=[5, 6], max_tokens=6, n=2, logprobs=1)
            assert [choice.text for choice in whole.choices] == [expected] * 2
            assert len(whole.choices[0].logprobs.tokens) == 6
            parts = client.completions.create(model="base", prompt=[5, 6], max_tokens=6, stream=True)
            assert "".join(part.choices[0].text for part in parts) == expected

            messages = [{"role": "user", "content": "he"}]
            chat = client.chat.completions.create(
                model="base", messages=messages, max_completion_tokens=6, logprobs=True, top_logprobs=2, seed=1
            )
            text = chat.choices[0].message.content
            assert text == tokenizer.decode(tokens_of(tokenizer.encode("user:he;", add_special_tokens=False), 6, 90))
            assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
            options = {"stream": True, "stream_options": {"include_usage": True}}
            chunks = [*client.chat.completions.create(model="base", messages=messages, max_tokens=6, **options)]
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == text
            assert chunks[-1].usage == chat.usage
            assert [model.id for model in client.models.list()] == ["base"]
            assert client.models.retrieve("base").owned_by == "jaxmoe"

            with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
                client.completions.create(model="gpt", prompt="he")
            with pytest.raises(openai.BadRequestError, match="token 0 is not for prompts"):
                client.completions.create(model="base", prompt=[0], stream=True)
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_goes_away_ends_its_request(tokenizer, streams: bool) -> None:
    engine = FakeEngine(vocab_size=90, num_slots=1, pace=0.01)
    with running(engine, tokenizer, max_length=10**6) as server:
        body = {"model": "base", "prompt": [[5], [6]], "max_tokens": 10**5, "stream": streams}

        async def ask_and_leave() -> None:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                if streams:
                    async with client.stream("POST", "/v1/completions", json=body) as response:
                        assert (await anext(response.aiter_lines())).startswith("data: ")
                    return
                post = asyncio.create_task(client.post("/v1/completions", json=body))
                await asyncio.to_thread(wait_until, lambda: server.service.engine.unfinished == 2)
                post.cancel()
                await asyncio.gather(post, return_exceptions=True)

        asyncio.run(ask_and_leave())
        # The second has waited for the slot all the time.
        wait_until(lambda: sorted(engine.canceled) == [0, 1])
        wait_until(lambda: server.service.engine.unfinished == 0)


async def come_and_go(url: str, clients: int, seed: int) -> list[int]:
    """Clients that ask at once, of which some leave at any time; the statuses of the others."""
    random_ = random.Random(seed)

    async def one(client: httpx.AsyncClient) -> int:
        words = [random_.randrange(1, 90) for _ in range(random_.randrange(1, 32))]
        body = {
            "model": "base",
            "prompt": words,
            "max_tokens": random_.randrange(1, 33),
            "n": random_.choice([1, 1, 2]),
        }
        patience = random_.choice([None, random_.random() * 2])
        if random_.random() < 0.5:
            return (await asyncio.wait_for(client.post("/v1/completions", json=body), patience)).status_code

        async def read() -> int:
            async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                last = [line async for line in response.aiter_lines() if line][-1]
                assert response.status_code != 200 or last == "data: [DONE]"
                return response.status_code

        return await asyncio.wait_for(read(), patience)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        found = await asyncio.gather(*(one(client) for _ in range(clients)), return_exceptions=True)
    errors = [one for one in found if isinstance(one, BaseException) and not isinstance(one, TimeoutError)]
    assert not errors
    return [one for one in found if isinstance(one, int)]


def resources(server) -> dict[str, int]:
    return {"tasks": server.tasks(), "threads": threading.active_count(), "files": len(os.listdir("/proc/self/fd"))}


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files as Linux tells them")
def test_two_hundred_clients_that_come_and_go_leave_nothing() -> None:
    model = jaxmoe.load(ROOT / "demo", mesh=mesh_of(2, 2, 2), progress=False)
    loads = ExpertLoads(lambda: model.placements, rebalance=True, window=8, interval=8, threshold=1.0)
    engine = ContinuousEngine(model, num_slots=16, num_pages=12, max_length=64, balancer=loads)
    with running(engine, Tokenizer.from_directory(ROOT / "demo"), queue=100, max_length=64) as server:
        asyncio.run(come_and_go(server.url, 4, seed=0))
        wait_until(lambda: server.tasks() <= 2)
        before = resources(server)
        statuses = asyncio.run(come_and_go(server.url, 200, seed=1))
        assert 200 in statuses
        assert {*statuses} <= {200, 429}
        wait_until(lambda: resources(server)["tasks"] <= before["tasks"])
        wait_until(lambda: not engine.has_work)
        counts = server.service.engine.counts
        assert (counts.waiting, counts.running, counts.pages_in_use, server.service.engine.unfinished) == (0, 0, 0, 0)
        # Threads of asyncio's pool are few and stay.
        pool = [thread for thread in threading.enumerate() if thread.name.startswith("asyncio_")]
        assert threading.active_count() - len(pool) <= before["threads"]
        wait_until(lambda: resources(server)["files"] <= before["files"] + 1)
        # Experts were counted and moved meanwhile.
        assert loads.moves > 0
        assert loads.total_LE.sum() == loads.total_LE.shape[0] * loads.total_LE[0].sum() > 0
        assert asyncio.run(come_and_go(server.url, 1, seed=5)) in ([200], [])


SERVER = """
import asyncio, sys
from pathlib import Path
from jaxmoe.generation.async_engine import AsyncEngine
from jaxmoe.generation.tokenizer import Tokenizer
from jaxmoe.serving import ExpertLoads, Limits, Metrics, Service, listen, run_service
from tests.support.fake_engine import FakeEngine

async def main():
    async with AsyncEngine(FakeEngine(vocab_size=90, pace=0.01)) as engine:
        metrics, limits = Metrics(lambda: engine.counts), Limits(max_length=10**6)
        tokenizer = Tokenizer.from_directory("demo")
        service = Service(
            engine, tokenizer, names={"base": None}, eos_token_ids=frozenset(), limits=limits, metrics=metrics, vocab_size=90
        )
        with listen(port=0) as bound:
            await run_service(service, bound, drain_seconds=float(sys.argv[1]), on_start=lambda url: print(url, flush=True))

asyncio.run(main())
print("ended")
"""


def refuses_connections(client: httpx.Client) -> bool:
    """Whether nothing listens any more. A connection made while the server closes is reset, which does not say so yet."""
    try:
        client.get("/health")
    except httpx.ConnectError:
        return True
    except httpx.TransportError:
        pass
    return False


@pytest.mark.full
@pytest.mark.parametrize(("drain", "tokens", "finishes"), [("30", 60, True), ("1", 10**5, False)])
def test_sigterm_lets_requests_end_and_waits_no_longer_than_it_may(drain: str, tokens: int, finishes: bool) -> None:
    process = subprocess.Popen([sys.executable, "-c", SERVER, drain], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        body = {"model": "base", "prompt": [5], "max_tokens": tokens, "stream": True}
        lines = []
        with httpx.Client(base_url=url, timeout=60) as client:
            with (
                contextlib.suppress(httpx.RemoteProtocolError),
                client.stream("POST", "/v1/completions", json=body) as response,
            ):
                for line in response.iter_lines():
                    lines += [line] if line else []
                    if len(lines) == 3:
                        process.send_signal(signal.SIGTERM)
            assert (lines[-1] == "data: [DONE]") == finishes
            wait_until(lambda: refuses_connections(client))
        assert process.wait(30) == 0
        assert process.stdout.read() == "ended\n"
        assert len([json.loads(line[6:]) for line in lines if line != "data: [DONE]"]) > 3
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("host", "keys", "message"),
    [
        ("0.0.0.0", [], "0.0.0.0 is reached from other machines, so clients need a key: give --api-key-file"),
        ("::", [], ":: is reached from other machines"),
        ("127.0.0.1", ["short"], "a key has at least 16 characters, and no space around them"),
        ("127.0.0.1", [f"{KEY} "], "no space around them"),
    ],
)
def test_addresses_that_are_not_listened_at(host: str, keys: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listen(host, 0, keys=keys)


def test_an_address_in_use_is_told() -> None:
    with listen(port=0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1 port {port}: Address already in use"):
            listen(port=port)
    with listen("0.0.0.0", 0, keys=[KEY]) as second:
        assert second.getsockname()[1]
