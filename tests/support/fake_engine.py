"""A continuous engine in plain Python, with the interface of `ContinuousEngine`: what it generates is known beforehand."""

import threading
import time
from collections.abc import Sequence

from jaxmoe.generation.requests import EngineCounts, Request, TokenResult


def tokens_of(prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What the fake generates for a prompt."""
    return [(sum(prompt) * 7 + 5 * place + 1) % vocab_size for place in range(1, count + 1)]


class FakeEngine:
    """Gives every running request one token a step, the oldest first; refuses prompts that hold token 0.

    Of the tokens that a constraint allows it takes the lowest.

    With a `gate`, a step waits until it is open; `pace` is how many seconds it takes.
    """

    def __init__(
        self, vocab_size: int = 37, num_slots: int = 4, gate: threading.Event | None = None, pace: float = 0.0
    ):
        self.vocab_size, self.num_slots, self.gate, self.pace = vocab_size, num_slots, gate, pace
        self.jobs: dict[int, tuple[Request, list[int]]] = {}
        self.submitted: list[Request] = []
        self.canceled: list[int] = []
        self.breaks: Exception | None = None
        self.threads: set[str] = set()
        self.generated = self.steps = self.prompt_tokens = 0

    def submit(self, request: Request) -> int:
        self.threads.add(threading.current_thread().name)
        if 0 in request.token_ids:
            raise ValueError("token 0 is not for prompts")
        number = len(self.submitted)
        self.submitted.append(request)
        self.prompt_tokens += len(request.token_ids)
        tokens = tokens_of(request.token_ids, request.max_new_tokens, self.vocab_size)
        self.jobs[number] = request, tokens
        return number

    def cancel(self, number: int) -> None:
        self.threads.add(threading.current_thread().name)
        if self.jobs.pop(number, None) is not None:
            self.canceled.append(number)

    @property
    def has_work(self) -> bool:
        return bool(self.jobs)

    @property
    def counts(self) -> EngineCounts:
        running = min(len(self.jobs), self.num_slots)
        return EngineCounts(
            waiting=len(self.jobs) - running,
            running=running,
            slots=self.num_slots,
            pages_in_use=running,
            pages=self.num_slots,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated,
            steps=self.steps,
        )

    def step(self) -> list[TokenResult]:
        self.threads.add(threading.current_thread().name)
        if self.gate is not None:
            assert self.gate.wait(timeout=60)
        if self.breaks is not None:
            raise self.breaks
        time.sleep(self.pace)
        self.steps += 1
        results = []
        for number in [*self.jobs][: self.num_slots]:
            request, tokens = self.jobs[number]
            token = tokens.pop(0)
            if request.constraint is not None:
                token = int(request.constraint.allowed().argmax())
                request.constraint.accept(token)
            reason = "stop" if token in request.eos_token_ids else None if tokens else "length"
            top = None
            if request.logprobs is not None:
                top = [((token + place) % self.vocab_size, -0.5 - place) for place in range(request.logprobs)]
            results.append(TokenResult(number, token, None if top is None else -0.5, top, reason))
            if reason is not None:
                del self.jobs[number]
        self.generated += len(results)
        return results
