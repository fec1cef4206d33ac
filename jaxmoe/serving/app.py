"""The application: OpenAI's completions and chat completions, the models, health and metrics."""

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxmoe.generation.requests import Request as EngineRequest
from jaxmoe.generation.requests import TokenConstraint
from jaxmoe.generation.tool_calls import CallReader
from jaxmoe.serving.answers import ChatCompletion, Completion, usage
from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.fields import Asked, read_fields
from jaxmoe.serving.guard import Guard, error_response, read_json, unless_gone
from jaxmoe.serving.prompts import one_kind, read_messages, read_template_variables
from jaxmoe.serving.service import Piece, Service


def make_app(service: Service, keys: Collection[str] = ()) -> Starlette:
    """Make the ASGI application.

    Args:
        service: the model behind it.
        keys: keys that clients need one of; empty for none, and for clients on this machine only.
    """

    async def completions(request: Request) -> Response:
        body = await _body(service, request)
        asked = read_fields(body, "completion")
        prompts = await asyncio.to_thread(service.encode_texts, one_kind(body))
        return Generated(service, Completion(asked.model), prompts, asked)

    async def chat(request: Request) -> Response:
        body = await _body(service, request)
        asked, variables = read_fields(body, "chat"), read_template_variables(body)
        prompt = await asyncio.to_thread(service.encode_chat, read_messages(body), variables)
        form = service.call_form(variables)
        constraints = await asyncio.to_thread(service.constraints, asked)
        read_calls = None if form is None else functools.partial(CallReader, form, variables["tools"])
        return Generated(service, ChatCompletion(asked.model), [prompt], asked, constraints, read_calls)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.names]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in service.names:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return JSONResponse(_model(service, name))

    async def health(_: Request) -> Response:
        state = "failed" if service.engine.error else "draining" if service.draining else "ok"
        return JSONResponse({"status": state}, status_code=200 if state == "ok" else 503)

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    paths = [route.path for route in routes]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, keys=keys, paths=paths, metrics=service.metrics)],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _server_error},  # type: ignore[dict-item]
    )


async def _body(service: Service, request: Request) -> Any:
    return await read_json(request, service.limits.body_bytes, service.limits.body_seconds)


def _model(service: Service, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": service.created, "owned_by": "jaxmoe"}


async def _api_error(_: Request, error: ApiError) -> Response:
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    told = {404: f"there is no {request.url.path}", 405: f"{request.method} does not go with {request.url.path}"}
    message = told.get(error.status_code, error.detail)
    return error_response(ApiError(error.status_code, message, headers=dict(error.headers or {})))


async def _server_error(_: Request, error: Exception) -> Response:
    del error  # the server's log has it, with a traceback
    return error_response(ApiError(500, "there is a mistake in the server; its log has it"))


class Generated(Response):
    """The answer of a model: whole, or as server-sent events. It ends its requests when the client has gone.

    Args:
        service: the model.
        answer: form of the answer.
        prompts: token ids.
        asked: fields of the request.
        constraints: constraints of a prompt's choices; empty for none.
        read_calls: function that makes a reader of the calls in a choice; None for text alone.

    Raises:
        ApiError: the requests are refused.
    """

    def __init__(
        self,
        service: Service,
        answer: Completion,
        prompts: list[list[int]],
        asked: Asked,
        constraints: Sequence[TokenConstraint | None] = (),
        read_calls: Callable[[], CallReader] | None = None,
    ):
        self._service, self._answer, self._asked = service, answer, asked
        self._read_calls = read_calls
        self._requests: list[EngineRequest] = service.requests(prompts, asked, constraints)
        self._prompt_tokens = sum(map(len, prompts))
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        if self._asked.stream:
            await unless_gone(receive, self._send_events(scope, receive, send))
            return
        response = await unless_gone(receive, self._whole())
        if response is not None:
            await response(scope, receive, send)

    async def _whole(self) -> Response:
        choices: list[list[Piece]] = [[] for _ in self._requests]
        try:
            async for piece in self._pieces():
                choices[piece.choice].append(piece)
        except ApiError as error:
            return error_response(error)
        return JSONResponse(
            {
                **self._answer.head(self._answer.whole),
                "choices": [self._answer.choice(pieces) for pieces in choices],
                "usage": usage(self._prompt_tokens, sum(map(len, choices))),
            }
        )

    async def _send_events(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = self._events()
        try:
            first = await anext(events)  # what the engine refuses is an answer with an error
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send_event(send, first)
        try:
            async for event in events:
                await _send_event(send, event)
            await _send_event(send, "[DONE]")
        except ApiError as error:
            await _send_event(send, error.body())
        finally:
            await events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> Any:
        answer, tokens = self._answer, 0
        head = answer.head(answer.chunk)
        head |= {"usage": None} if self._asked.include_usage else {}
        started: set[int] = set()
        async for piece in self._pieces():
            tokens += 1
            if piece.choice not in started:
                started.add(piece.choice)
                for choice in answer.first(piece.choice):
                    yield {**head, "choices": [choice]}
            # In the middle of a character there is nothing to tell.
            if piece.text or piece.calls or piece.token or piece.finish_reason:
                yield {**head, "choices": [answer.delta(piece)]}
        if self._asked.include_usage:
            yield {**head, "choices": [], "usage": usage(self._prompt_tokens, tokens)}

    async def _pieces(self) -> AsyncIterator[Piece]:
        pieces = self._service.pieces(self._requests, self._asked, self._read_calls)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]


async def _send_event(send: Send, event: Any) -> None:
    text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
