"""A continuous engine that a thread steps, and asyncio talks to: `AsyncEngine`."""

import asyncio
import contextlib
import functools
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from jaxmoe.generation.requests import EngineCounts, Request, TokenResult

T = TypeVar("T")


class StepEngine(Protocol):
    """All that is asked of a `ContinuousEngine` here."""

    @property
    def has_work(self) -> bool:
        """Whether something waits or runs."""
        ...

    @property
    def counts(self) -> EngineCounts:
        """Counts as they are between two steps."""
        ...

    def submit(self, request: Request) -> int:
        """Take a request, and return its number."""
        ...

    def cancel(self, request_id: int) -> None:
        """Let go of a request, if it is there."""
        ...

    def step(self) -> list[TokenResult]:
        """Run one step, and return the tokens that came of it."""
        ...


class EngineStoppedError(RuntimeError):
    """The engine has ended, by `AsyncEngine.close` or by an error, which is then the cause."""


class AsyncEngine:
    """The asyncio side of an engine, of which one thread does everything else.

    Steps block, for milliseconds or (the first) for minutes of compiling, so they are not for an event loop. What is to be
    done goes to the thread by a queue and is done between two steps; tokens come back once a step.

    Args:
        engine: engine that nobody else uses meanwhile.

    Attributes:
        unfinished: number of requests that were submitted and have not come to their end.

    Example:
        >>> async def run(engine, request):
        ...     async with AsyncEngine(engine) as running, await running.submit([request]) as tokens:
        ...         return [result.token_id async for _, result in tokens]
    """

    def __init__(self, engine: StepEngine):
        self._engine = engine
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._streams: dict[int, tuple[TokenStream, int]] = {}  # the thread's own
        self._counts = engine.counts
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # between the last look at the queue and what comes after it
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="jaxmoe-engine", daemon=True)
        self.unfinished = 0  # the event loop's own

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def counts(self) -> EngineCounts:
        """Counts after the last step."""
        return self._counts

    @property
    def error(self) -> BaseException | None:
        """The error that has ended the engine; None while it runs."""
        return self._error

    async def submit(self, requests: Sequence[Request]) -> "TokenStream":
        """Submit requests that belong together.

        Returns:
            Their tokens as they come. A stream that is not read to its end is canceled, as by ``async with``.

        Raises:
            ValueError: the engine can never run one of them; then none of them runs.
            EngineStoppedError: the engine has ended.
        """
        stream = TokenStream(self, len(requests))
        try:
            await self.call(lambda: self._start(stream, requests))
        except BaseException:
            # Where the caller gave up, the requests may be under way already, or may still be going to.
            stream.cancel()
            raise
        return stream

    async def call(self, function: Callable[[], T]) -> T:
        """Call a function in the engine's thread, between two steps.

        Raises:
            EngineStoppedError: the engine has ended.
        """
        future: Future[T] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:  # it belongs to the caller
                future.set_exception(error)

        self._put(do)
        return await asyncio.wrap_future(future)

    async def close(self) -> None:
        """End the thread after the step that it is in; unfinished streams raise `EngineStoppedError`."""
        self._stopping.set()
        self._todo.put(lambda: None)
        await asyncio.to_thread(self._thread.join)

    # --- in the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._do_all(wait=not self._engine.has_work)
                if not self._stopping.is_set() and self._engine.has_work:
                    self._deliver(self._engine.step())
                self._counts = self._engine.counts
        except BaseException as error:  # told to everyone who waits for the engine
            self._error = error
        with self._lock:
            self._ended = True
        self._do_all(wait=False)
        ended = self._stopped()
        if self._error is None:
            for request_id in self._streams:
                self._engine.cancel(request_id)
        for stream in {stream for stream, _ in self._streams.values()}:
            self._post(functools.partial(stream._end, ended))
        self._streams.clear()

    def _do_all(self, *, wait: bool) -> None:
        try:
            while True:
                self._todo.get(block=wait)()
                wait = False
        except queue.Empty:
            return

    def _start(self, stream: "TokenStream", requests: Sequence[Request]) -> None:
        if self._ended:
            raise self._stopped()
        for index, request in enumerate(requests):
            request_id = self._engine.submit(request)
            stream._request_ids.append(request_id)
            self._streams[request_id] = stream, index

    def _cancel(self, stream: "TokenStream", indices: Sequence[int]) -> None:
        for request_id in [stream._request_ids[index] for index in indices if index < len(stream._request_ids)]:
            if self._streams.pop(request_id, None) is not None and self._error is None:
                self._engine.cancel(request_id)

    def _deliver(self, results: list[TokenResult]) -> None:
        found = [
            (*self._streams[result.request_id], result) for result in results if result.request_id in self._streams
        ]
        for result in results:
            if result.finish_reason is not None:
                self._streams.pop(result.request_id, None)
        if found:
            self._post(functools.partial(_put_all, found))

    def _post(self, function: Callable[[], Any]) -> None:
        # A loop that was closed has nobody who waits.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function)

    # --- in the event loop

    def _put(self, do: Callable[[], None]) -> None:
        with self._lock:
            if self._ended:
                raise self._stopped()
            self._todo.put(do)

    def _stopped(self) -> EngineStoppedError:
        ended = EngineStoppedError("the engine has ended" + (f": {self._error}" if self._error else ""))
        ended.__cause__ = self._error
        return ended


def _put_all(found: "list[tuple[TokenStream, int, TokenResult]]") -> None:
    for stream, index, result in found:
        stream._put(index, result)


class TokenStream:
    """The tokens of requests that belong together, for ``async for``: the request's number among them, and the result.

    Leaving its ``async with`` block cancels what has not come yet.
    """

    def __init__(self, engine: AsyncEngine, count: int):
        self._engine = engine
        self._queue: asyncio.Queue[tuple[int, TokenResult] | EngineStoppedError | None] = asyncio.Queue()
        self._request_ids: list[int] = []  # the thread's own
        self._left = set(range(count))
        engine.unfinished += count

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __aiter__(self) -> AsyncIterator[tuple[int, TokenResult]]:
        return self

    async def __anext__(self) -> tuple[int, TokenResult]:
        if not self._left and self._queue.empty():
            raise StopAsyncIteration
        item = await self._queue.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, EngineStoppedError):
            raise item
        return item

    def cancel(self, index: int | None = None) -> None:
        """Let go of a request, or of all, before the engine's next step; nothing of it comes any more. Twice is once."""
        for item in [self._queue.get_nowait() for _ in range(self._queue.qsize())]:
            if index is not None and (not isinstance(item, tuple) or item[0] != index):
                self._queue.put_nowait(item)
        indices = [one for one in sorted(self._left) if index in (None, one)]
        if not indices:
            return
        self._leave(*indices)
        if not self._left:
            self._queue.put_nowait(None)  # for who waits at this moment
        # Where the engine has ended, everything is gone with it.
        with contextlib.suppress(EngineStoppedError):
            self._engine._put(lambda: self._engine._cancel(self, indices))

    def _put(self, index: int, result: TokenResult) -> None:
        if index in self._left:
            self._queue.put_nowait((index, result))
            if result.finish_reason is not None:
                self._leave(index)

    def _end(self, error: EngineStoppedError) -> None:
        if self._left:
            self._leave(*self._left)
            self._queue.put_nowait(error)

    def _leave(self, *indices: int) -> None:
        self._left.difference_update(indices)
        self._engine.unfinished -= len(indices)
