"""A service over a fake engine, and clients of the application in this process."""

import asyncio
import contextlib
from types import SimpleNamespace

import httpx
import pytest

from jaxmoe.generation.async_engine import AsyncEngine
from jaxmoe.generation.tokenizer import Tokenizer
from jaxmoe.serving import Limits, Metrics, Service, make_app
from tests.support.fake_engine import FakeEngine
from tests.support.tokenizers import byte_level, save

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}({{ c.function.arguments.at }}){% endfor %};{% endfor %}"
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    asked = {"default": '<tool_call>\n{"name"', "no calls": "[TOOL_CALLS]"}  # in a comment, which is not shown
    templates = [{"name": name, "template": f"{TEMPLATE}{{# {text} #}}"} for name, text in asked.items()]
    save(byte_level(), directory, chat_template=templates)
    return Tokenizer.from_directory(directory)


@pytest.fixture
def served(tokenizer):
    """``async with served(...) as s``: `s.client` asks, `s.engine` is the fake, `s.service` what stands between."""

    @contextlib.asynccontextmanager
    async def start(*, engine=None, keys=(), base_url="http://localhost", **limits):
        engine = engine or FakeEngine(vocab_size=100)
        async with AsyncEngine(engine) as running:
            service = Service(
                running,
                tokenizer,
                names={"base": None, "sql": "sql"},
                eos_token_ids=frozenset({99}),
                limits=Limits(**{"max_length": 200, **limits}),
                metrics=Metrics(lambda: running.counts),
                vocab_size=100,
            )
            transport = httpx.ASGITransport(app=make_app(service, keys))
            async with httpx.AsyncClient(transport=transport, base_url=base_url, timeout=60) as client:
                yield SimpleNamespace(client=client, engine=engine, service=service, running=running)

    return start


@pytest.fixture
def ask(served):
    """``ask(path, body)`` gives the answer of a fresh service, ``ask.engine`` its engine."""

    def once(path, body=None, *, headers=None, **options):
        async def run():
            async with served(**options) as s:
                once.engine = s.engine
                if body is None:
                    return await s.client.get(path, headers=headers)
                if isinstance(body, bytes):
                    return await s.client.post(path, content=body, headers=headers)
                return await s.client.post(path, json=body, headers=headers)

        return asyncio.run(run())

    return once
