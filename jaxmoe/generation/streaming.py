"""`stream`: prompts in, tokens out as they come."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from jaxmoe.checks import flag, integer, real_number
from jaxmoe.checks import token_ids as check_token_ids
from jaxmoe.generation.api import encode
from jaxmoe.generation.arguments import eos_token_ids_for, seeds_for, stop_strings, text_streams
from jaxmoe.generation.continuous import ContinuousEngine
from jaxmoe.generation.detokenize import TextStream
from jaxmoe.generation.output import TokenEvent
from jaxmoe.generation.params import SamplingParams, sampling_params_of
from jaxmoe.generation.prompts import Prompt
from jaxmoe.generation.requests import Request, TokenResult
from jaxmoe.generation.tokenizer import Tokenizer
from jaxmoe.models import Decoder


def stream(
    model: Decoder,
    prompts: str | Iterable[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling_params: SamplingParams | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | Sequence[int] | None = None,
    adapters: Sequence[str | None] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    ignore_eos: bool = False,
    stop: str | Sequence[str] | None = None,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tokenizer: Tokenizer | None = None,
    num_slots: int | None = None,
    max_length: int | None = None,
    timeout: float | None = None,
) -> "EventStream":
    """Generate, and hand out every token as it comes, for ``for`` and for ``async for``.

    The devices work while the loop asks for tokens, and only then: a loop that is left leaves nothing running. Events of
    several prompts come mixed, those of each in order.

    Args:
        model: model from `jaxmoe.load`.
        prompts, max_new_tokens, sampling_params: arguments as for `jaxmoe.generate`, and so are those that follow.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: the same.
        adapters, eos_token_id, ignore_eos, stop, chat, chat_template_kwargs, tokenizer: the same.
        num_slots, max_length: arguments as for `ContinuousEngine`; programs are compiled once for each pair of them.
        timeout: seconds from this call after which the loop raises `TimeoutError`, between two steps; None for no limit.

    Returns:
        The events, a `TokenEvent` for each token. `cancel(index)` ends one prompt, which then has no further event.

    Raises:
        ValueError, TypeError, FileNotFoundError: as for `jaxmoe.generate`.
        TimeoutError: raised by the loop.

    Example:
        >>> events = jaxmoe.stream(model, ["import os", "def f"], max_new_tokens=8, max_length=64)
        >>> sum(event.finish_reason is not None for event in events)
        2
    """
    begin = time.monotonic()
    if timeout is not None:
        timeout = real_number("timeout", timeout, above=0)
    params = sampling_params_of(
        sampling_params,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    max_new_tokens = integer("max_new_tokens", max_new_tokens, least=1)
    ignore_eos, chat = flag("ignore_eos", ignore_eos), flag("chat", chat)
    stop = stop_strings(stop)
    engine = ContinuousEngine(model, num_slots=num_slots, max_length=max_length)
    given_eos = None if eos_token_id is None else check_token_ids("eos_token_id", eos_token_id, model.config.vocab_size)
    token_ids = encode(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        chat=chat,
        chat_template_kwargs=chat_template_kwargs,
        tokenizer=tokenizer,
    )
    texts = text_streams(len(token_ids), model, tokenizer, stop)
    eos_token_ids = frozenset[int]() if ignore_eos else eos_token_ids_for(model, given_eos)
    seeds = seeds_for(seed, len(token_ids))
    names = [None] * len(token_ids) if adapters is None else list(adapters)
    if len(names) != len(token_ids):
        raise ValueError(f"adapters has a name or None for each prompt: got {len(names)} for {len(token_ids)} prompts")
    numbers = [
        engine.submit(
            Request(
                token_ids=ids,
                max_new_tokens=max_new_tokens,
                params=params,
                seed=one,
                eos_token_ids=eos_token_ids,
                adapter=name,
            )
        )
        for ids, one, name in zip(token_ids, seeds, names, strict=True)
    ]
    return EventStream(engine, numbers, texts, None if timeout is None else begin + timeout)


class EventStream:
    """Token events of one `stream` call; see there.

    It may be left at any time, and cancels what is left; ``with`` and ``async with`` do so at the end of their block.
    """

    def __init__(
        self, engine: ContinuousEngine, numbers: Sequence[int], texts: list[TextStream] | None, deadline: float | None
    ):
        self._engine, self._numbers, self._texts, self._deadline = engine, list(numbers), texts, deadline
        self._left = {number: index for index, number in enumerate(numbers)}
        self._ready: deque[TokenEvent] = deque()
        self._lock = threading.Lock()  # an `async for` that was canceled may leave a step running in its thread

    def __iter__(self) -> Iterator[TokenEvent]:
        return self

    def __next__(self) -> TokenEvent:
        self._fill()
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if not self._ready:
            await asyncio.to_thread(self._fill)  # a step blocks
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    def cancel(self, index: int) -> None:
        """End the prompt of this number: it has no further event. One that has ended is left alone."""
        number = self._numbers[integer("index", index, least=0, most=len(self._numbers) - 1)]
        with self._lock:
            self._left.pop(number, None)
            self._engine.cancel(number)
            self._ready = deque(event for event in self._ready if event.index != index)

    def close(self) -> None:
        """End all prompts."""
        with self._lock:
            self._cancel_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _fill(self) -> None:
        """Run steps until there is an event, or none is to come."""
        with self._lock:
            while self._left and not self._ready:
                if self._deadline is not None and time.monotonic() >= self._deadline:
                    self._cancel_all()
                    raise TimeoutError("the timeout of jaxmoe.stream is over; the prompts that were left are canceled")
                for result in self._engine.step():
                    self._take(result)

    def _take(self, result: TokenResult) -> None:
        index = self._left.get(result.request_id)
        if index is None:
            return
        piece, reason = None, result.finish_reason
        if self._texts is not None:
            piece, reason = self._texts[index].take(result.token_id, reason)
        if reason is not None:
            del self._left[result.request_id]
            self._engine.cancel(result.request_id)  # where a stop string ended it, the engine does not know
        self._ready.append(TokenEvent(index, result.token_id, piece, reason))

    def _cancel_all(self) -> None:
        for number in self._left:
            self._engine.cancel(number)
        self._left.clear()
        self._ready.clear()
