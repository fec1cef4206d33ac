"""The door: keys, names of hosts, sizes of bodies, clients that have gone; and the form of every error."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Collection, Coroutine
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxmoe.serving.errors import ApiError
from jaxmoe.serving.metrics import Metrics

T = TypeVar("T")

# Paths that say nothing of what is served.
_OPEN = {"/health"}
_LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]"}


def error_response(error: ApiError) -> JSONResponse:
    """The answer with an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


class Guard:
    """Middleware that lets in who has a key, and counts answers.

    Without keys it lets in who is on this machine, and not a page of a browser that runs here: such a page names its own
    host, and sends no JSON to others without asking.

    Args:
        app: application behind it.
        keys: keys that are accepted; empty for none needed.
        paths: paths of the application; all others count as one.
        metrics: counts of answers.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str], paths: Collection[str], metrics: Metrics):
        self._app, self._metrics, self._paths = app, metrics, frozenset(paths)
        # Digests are of one length, and comparing them tells nothing of the keys.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def count(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.responses.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await error_response(error)(scope, receive, count)
            return
        await self._app(scope, receive, count)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if not self._digests:
            host = headers.get("host", "")
            if (host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host) not in _LOOPBACK_NAMES:
                raise ApiError(403, "without a key this server answers to localhost, 127.0.0.1 and [::1] only")
            return
        if scope["path"] in _OPEN:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # All of them are compared, so that the time does not tell which was close.
        found = [hmac.compare_digest(digest, one) for one in self._digests]
        if kind.lower() != "bearer" or not any(found):
            raise ApiError(
                401,
                "this server wants a key: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


async def read_json(request: Request, most_bytes: int, seconds: float) -> Any:
    """Read the body of a request as JSON.

    Raises:
        ApiError: it is too long, takes too long, or is no JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "a request is JSON: Content-Type: application/json")
    too_long = ApiError(413, f"the body of a request has at most {most_bytes} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most_bytes:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:
                    raise too_long
    except TimeoutError:
        raise ApiError(408, f"the body of a request comes within {seconds:g} seconds") from None
    except ClientDisconnect:
        raise ApiError(499, "the client has gone") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Do the work, and give up when the client has gone; None then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    worker, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)
